"""Several processes against one: E5 (the same plan and losses), G1 (throughput) and G2 (memory).

    python benchmarks/distributed.py law [--device cuda]     # 50 steps, tiny; 1 and 2 processes, DDP and FSDP2
    python benchmarks/distributed.py scale [--gpus 2]        # 8B geometry, random weights; --tiny on the CPU

`scale` starts four jobs, one after another: one GPU and N GPUs by DDP with the same global batch (G1); one GPU without
packing and N GPUs by FSDP2 with half of that batch, which one GPU takes in a single pass (G2). Every job searches,
settles, is cut and tunes on. Prints one JSON line a job, then the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prunetune.config.recipe import from_mapping
from prunetune.data.batches import BatchStream
from prunetune.data.encoding import Example
from prunetune.pruning.sites import find_sites
from prunetune.search.plan_rules import PlanConstraints
from prunetune.train.checkpoints import NullCheckpointStore
from prunetune.train.job import TrainingJob
from prunetune.train.loop import tune_and_prune
from prunetune.train.parallel.ranks import Ranks, init_distributed
from prunetune.train.schedule import build_schedule
from prunetune.utils.environment import device_name

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip


class Notes:
    """Keeps the records."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        self.steps.append(record)

    def validation(self, record: dict[str, Any]) -> None:
        pass


def model_of(shape: dict[str, Any], dtype: torch.dtype, ranks: Ranks) -> Any:
    """Random weights: on the device; to be sharded in rank 0's memory, and on the meta device on the others."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if ranks.uses_fsdp and not ranks.is_main:
        return model.eval().requires_grad_(False)
    device = torch.device("cpu") if ranks.uses_fsdp else ranks.device
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)  # its buffers are computed
    for name, parameter in model.named_parameters():
        made = torch.ones if "norm" in name else torch.randn
        values = made(parameter.shape, device=ranks.device) * (1 if "norm" in name else 0.02)
        parameter.data.copy_(values.to(dtype))
    return model.eval().requires_grad_(False)


def examples(count: int, length: int, vocabulary: int, *, equal: bool) -> tuple[Example, ...]:
    """Random tokens, and an answer of a quarter of them; all of one length, or of different ones."""
    rng = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        size = length if equal else length // 2 + index * 7 % (length // 2)
        ids = torch.randint(3, vocabulary, (size,), generator=rng).tolist()
        answer = size // 4  # the first token, again and again: can be learnt
        made.append(Example((*ids[:-answer], *[ids[0]] * answer), size - answer, f"row {index}"))
    return tuple(made)


def work(options: argparse.Namespace) -> dict[str, Any]:
    """One rank's part of a job; what rank 0 found."""
    device = torch.device(options.device)
    ranks = init_distributed(device)
    if ranks.world_size == 1:
        ranks = Ranks(device=device)
    shape, dtype = (TINY, torch.float32) if options.tiny else (LLAMA_8B, torch.bfloat16)
    config = from_mapping(
        {
            "train": {"steps": options.steps, "batch_size": options.batch, "weights": options.weights, "warmup": 0.1}
            | {"micro_tokens": options.micro_tokens, "packing": options.packing},
            "lora": {"rank": options.rank},
            "search": {
                "share": 0.5,
                "settle": 0.25,
                "init_batches": 1,
                "batch_size": options.batch,
            },
            "budget": {"keep": 0.6},
        }
    )
    started = time.monotonic()
    model = model_of(shape, dtype, ranks)
    rows = examples(4 * options.batch + 3, options.length, shape["vocab_size"], equal=not options.uneven)
    notes, sites = Notes(), find_sites(model)

    job = TrainingJob(
        model=model, sites=sites, constraints=PlanConstraints("per-layer", 32 if options.tiny else 128),
        train_stream=BatchStream(rows, options.batch, 1),
        search_stream=BatchStream(rows, options.batch, 2),
        valid_examples=(), pad_id=0, config=config, schedule=build_schedule(config),
        checkpoints=NullCheckpointStore(), observer=notes,
        ranks=ranks,
    )  # fmt: skip
    del model
    loaded = time.monotonic() - started
    plan = tune_and_prune(job)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    peaks = [0.0] * ranks.world_size
    for rank in range(ranks.world_size):
        seen = torch.tensor([float(peak if rank == ranks.rank else 0)], device=ranks.device)
        ranks.all_reduce_sum_([seen])
        peaks[rank] = round(float(seen) / 1e9, 2)
    found = {
        "world": ranks.world_size, "sharded": ranks.uses_fsdp, "device": device_name(ranks.device),
        "load_s": round(loaded, 1),
        "total_s": round(time.monotonic() - started, 1), "peak_gb": peaks, "tokens": options.batch * options.length,
        "step_s": paces(notes.steps), "loss": [record["loss"] for record in notes.steps], "plan": plan.to_json(),
    }  # fmt: skip
    ranks.destroy_process_group()
    return found if ranks.is_main else {}


def paces(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of a step in each phase, without its first: that one records, or measures importance."""
    found: dict[str, list[float]] = {}
    for before, record in itertools.pairwise(steps):
        if before["phase"] == record["phase"]:
            found.setdefault(record["phase"], []).append(record["seconds"] - before["seconds"])
    return {phase: round(statistics.median(seconds), 4) for phase, seconds in found.items()}


def launch(world: int, *arguments: str, shards: bool = False) -> dict[str, Any]:
    """Run `world` processes of this file; what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as place:
        ranks = []
        for rank in range(world):
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
            if world > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                environment |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if shards:
                environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
            command = [sys.executable, __file__, "work", "--out", f"{place}/found.json", *arguments]
            ranks.append(subprocess.Popen(command, env=environment))
        while any(rank.poll() is None for rank in ranks):
            time.sleep(0.2)
            if any(rank.poll() for rank in ranks):
                for rank in ranks:
                    rank.kill()
                raise SystemExit(f"a rank failed: {' '.join(arguments)}")
        if any(rank.returncode for rank in ranks):
            raise SystemExit(f"a rank failed: {' '.join(arguments)}")
        found: dict[str, Any] = json.loads(Path(place, "found.json").read_text(encoding="utf-8"))
    return found


def law(device: str) -> None:
    """E5; on GPUs, of G1."""
    arguments = ("--tiny", "--steps", "50", "--batch", "7", "--length", "48", "--rank", "8", "--uneven")
    arguments += ("--device", device)
    for name, weights, shards in (("DDP", "adapters", False), ("DDP", "all", False), ("FSDP2", "adapters", True)):
        one = launch(1, *arguments, "--weights", weights)
        two = launch(2, *arguments, "--weights", weights, shards=shards)
        apart = [abs(a - b) for a, b in zip(one["loss"], two["loss"], strict=True)]
        same = one["plan"] == two["plan"]
        print(
            json.dumps(
                {
                    "bar": "E5",
                    "case": f"{name}, {weights}",
                    "device": one["device"],
                    "loss": one["loss"][-1],
                    "same plan": same,
                    "last": apart[-1],
                    "largest": max(apart),
                }
            )
        )


def scale(options: argparse.Namespace) -> None:
    """G1 and G2."""
    common = ["--steps", str(options.steps), "--length", str(options.length), "--rank", str(options.rank)]
    common += ["--micro-tokens", str(options.micro_tokens), *(["--tiny"] if options.tiny else [])]
    common += ["--device", "cpu" if options.tiny or not torch.cuda.is_available() else "cuda"]
    whole, half = ["--batch", str(options.batch)], ["--batch", str(options.batch // 2)]
    found = {}
    for name, world, shards, own in (
        ("one", 1, False, whole),
        ("ddp", options.gpus, False, whole),
        ("one, padded", 1, False, [*half, "--packing", "off"]),
        ("fsdp", options.gpus, True, half),
    ):
        if name.split(",")[0] in options.only:
            found[name] = launch(world, *common, *own, shards=shards)
            print(
                json.dumps({"job": name} | {key: one for key, one in found[name].items() if key != "plan"}), flush=True
            )
    if {"one", "ddp"} <= found.keys():
        ratios = {
            phase: round(pace / found["ddp"]["step_s"][phase], 2) for phase, pace in found["one"]["step_s"].items()
        }
        same = found["one"]["plan"] == found["ddp"]["plan"]
        print(json.dumps({"bar": "G1", "throughput": ratios, "target": ">= 1.7", "same plan": same}))
    if {"one, padded", "fsdp"} <= found.keys() and not options.tiny:
        value = max(found["fsdp"]["peak_gb"]) / max(found["one, padded"]["peak_gb"])
        print(json.dumps({"bar": "G2", "peak ratio": round(value, 3), "target": "<= 0.6"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("law", "scale", "work"))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["one", "ddp", "fsdp"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--device", default="cpu", help="of law; scale takes GPUs where there are some")
    parser.add_argument("--uneven", action="store_true", help="rows of different lengths")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="examples of a step, over all ranks")
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--micro-tokens", type=int, default=6144)
    parser.add_argument("--rank", type=int, default=32, help="of the adapters")
    parser.add_argument("--packing", default="auto")
    parser.add_argument("--weights", default="adapters")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.verb == "work":
        found = work(options)
        if found:
            options.out.write_text(json.dumps(found), encoding="utf-8")
    elif options.verb == "law":
        law(options.device)
    else:
        scale(options)


if __name__ == "__main__":
    main()
