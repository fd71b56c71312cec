"""E7: planted faults of a whole run on a tiny random model: each is survived, or ends it with one line and no loss.

    python benchmarks/reliability/faults.py [--small FOLDER] [--device cpu]

`--small` names an empty folder on a file system of 75 to 100 MB of its own (`mount -t tmpfs -o size=80m tmpfs FOLDER`);
without it the full disk is left out. Faults, each through the command line in a process of its own:

* disk full: at a step the rest of the file system is filled, so that the next checkpoint, or the next line of a record,
  does not fit; then the filling goes and the run is resumed;
* tracker down: MLflow (where it is installed) told of a server that refuses, and of one that never answers;
* data breaks off: a hub data set that fails after some rows, and a file that lost its second half between two starts;
* no numbers: the weights of one step's gradient become NaN; every step's do, until the run ends;
* out of memory: passes above 32 tokens fail as CUDA's allocator does. (Where memory really
  runs out: `training_memory.py` with more `--micro-tokens` than the GPU has room for.)

"same": the resumed run's model is that of a run without faults, to the byte. Prints one JSON object a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RUNNER = """
import json, os, sys
plan = json.loads(sys.argv.pop(1))
import torch
from prunetune.cli import app
from prunetune.runs.folder import RunFolder
from prunetune.train.passes import PackedPasses, PaddedPasses

if "fill" in plan:
    plain = RunFolder.append_record
    def append(self, name, record):
        plain(self, name, record)
        if name == "metrics.jsonl" and record["step"] == plan["fill"]["step"]:
            with open(plan["fill"]["file"], "wb") as file:
                try:
                    while True:
                        os.write(file.fileno(), b"0" * plan["fill"]["grain"])
                except OSError:
                    pass
    RunFolder.append_record = append
if "break" in plan:
    import datasets
    def rows(*args, **options):
        def all_of():
            for n in range(30):
                yield {"prompt": f"a{n} ", "completion": f"b{n}"}
            raise ConnectionError("the stream was closed by the server")
        return all_of()
    datasets.load_dataset = rows
for kind in (PaddedPasses, PackedPasses):
    def spoil(tune=kind.tune, seen=[0]):
        def spoilt(self, examples, gates):
            seen[0] += 1
            if "room" in plan and self.micro_tokens > plan["room"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            found = tune(self, examples, gates)
            if seen[0] in plan.get("nan", []):
                next(p for n, p in self.model.named_parameters() if "lora_B" in n).grad.fill_(float("nan"))
            return found
        return spoilt
    kind.tune = spoil()
app.main()
"""
RECIPE: dict[str, Any] = {
    "budget": {"keep": 0.6, "align": 8},
    "train": {
        "steps": 12, "batch_size": 8, "checkpoint_every": 2, "validate_every": 6, "micro_tokens": 128, "packing": "off",
        "weights": "adapters",
    },
    "lora": {"rank": 4},
    "search": {"share": 0.4, "settle": 0.2, "init_batches": 1, "batch_size": 8},
    "distill": {"teacher": "none"},
    "evaluate": {"limit": 4, "generate_limit": 0, "dense_tuned": False},
}  # fmt: skip


def make(folder: Path) -> None:
    """A model of a few thousand weights, a tokenizer of characters, and rows."""
    letters = ["[PAD]", "[END]", *"abcdefghijklmnopqrstuvwxyz0123456789 "]
    words = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[END]")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    rows = [{"prompt": f"say a{n} ", "completion": f"a{n} a{n}"} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Bench:
    """Runs the command line with a fault planted, and says how it ended."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device

    def run(
        self, name: str, plan: dict[str, Any] | None = None, *, out: Path | None = None, resume: bool = False,
        env: dict[str, str] | None = None, **changes: Any,
    ) -> dict[str, Any]:  # fmt: skip
        out = out or self.folder / name
        recipe = {"model": str(self.folder / "dense"), "out": str(out), "device": self.device, "dtype": "float32"}
        recipe |= {"data": {"train": [str(self.folder / "rows.jsonl")]}} | RECIPE | changes
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        started = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-c", RUNNER, json.dumps(plan or {}), "run", str(file), *(["--resume"] if resume else [])],
            capture_output=True, text=True, check=False, env=os.environ | (env or {}),
        )  # fmt: skip
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("prunetune:") or "goes on without" in line or "halved" in line
                or "out of GPU" in line]  # fmt: skip
        return {
            "code": ended.returncode, "said": said, "traceback": any("Traceback" in line for line in lines),
            "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip

    def same(self, out: Path) -> bool:
        """Whether a finished run's plan and model are those of the run without faults."""
        names = ("plan.json", "model/model.safetensors")
        whole = self.folder / "whole"
        return all(
            (out / name).is_file() and (out / name).read_bytes() == (whole / name).read_bytes() for name in names
        )


def full_disk(bench: Bench, small: Path, step: int, grain: int) -> dict[str, Any]:
    """Full from `step` on, to the last `grain` bytes."""
    shutil.rmtree(small / "run", ignore_errors=True)
    filling = small / "filling"
    first = bench.run("full", {"fill": {"step": step, "file": str(filling), "grain": grain}}, out=small / "run")
    kept = sorted(path.name for path in (small / "run" / "checkpoints").iterdir())
    filling.unlink()
    second = bench.run("full", out=small / "run", resume=True)
    return {
        "fault": f"disk full at step {step}, {grain} bytes at a time", "first": first, "checkpoints": kept,
        "resumed": second, "same": bench.same(small / "run"),
    }  # fmt: skip


def tracker_down(bench: Bench, kind: str, address: str) -> dict[str, Any]:
    """MLflow at an address where nobody answers."""
    found = bench.run(f"tracker-{kind}", env={"MLFLOW_TRACKING_URI": address}, track=["mlflow"])
    return {"fault": f"tracker {kind}", "first": found, "same": bench.same(bench.folder / f"tracker-{kind}")}


def data_ends(bench: Bench) -> list[dict[str, Any]]:
    """A stream that breaks off at the start, and a file that is shorter when a run is resumed."""
    hub = bench.run("hub", {"break": True}, data={"train": ["owner/name"]})
    rows = bench.folder / "rows.jsonl"
    whole = rows.read_text()
    stopped = bench.run("short", {"nan": list(range(7, 99))})  # ends after its sixth NaN
    rows.write_text(whole[: len(whole) // 2])
    torn = bench.run("short", resume=True)
    rows.write_text("".join(line + "\n" for line in whole.splitlines()[:30]))
    short = bench.run("short", resume=True)
    rows.write_text(whole)
    again = bench.run("short", resume=True)
    return [
        {"fault": "hub data set breaks off", "first": hub, "left": (bench.folder / "hub").exists()},
        {"fault": "NaN in every step from 7 on", "first": stopped},
        {"fault": "file torn in the middle of a row, at resume", "first": torn},
        {"fault": "file ends early, at resume", "first": short, "resumed": again,
         "done": (bench.folder / "short" / "model").exists()},
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), args.device)
        make(bench.folder)
        print(json.dumps({"fault": "none", "first": bench.run("whole")}), flush=True)
        if args.small:
            for step, grain in ((5, 64), (9, 4096)):
                print(json.dumps(full_disk(bench, args.small, step, grain)), flush=True)
        if find_spec("mlflow"):
            with socket.socket() as silent:  # listens, and never answers
                silent.bind(("127.0.0.1", 0))
                silent.listen()
                for kind, port in (("refuses", 9), ("never answers", silent.getsockname()[1])):
                    print(json.dumps(tracker_down(bench, kind, f"http://127.0.0.1:{port}")), flush=True)
        for row in data_ends(bench):
            print(json.dumps(row), flush=True)
        for fault, plan in (("NaN once", {"nan": [3]}), ("out of memory above 32 tokens", {"room": 32})):
            found = bench.run(fault.replace(" ", "-"), plan)
            print(json.dumps({"fault": fault, "first": found}), flush=True)


if __name__ == "__main__":
    main()
