"""G3: one rank of a run is killed; the others say so in a line; any number of processes goes on, to the same end.

    python benchmarks/ranks_killed.py [--processes 2] [--steps 200] [--fsdp]

A tiny random model. Runs it alone without a stop; then with N processes, killing the last rank (SIGKILL) in the search;
goes on with one process and ends that (SIGTERM) while it settles; goes on with N. Prints JSON, with what each said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", *(str(number) for number in range(60))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fsdp", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(measured(Path(place), options)))


def measured(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The whole course."""
    recipe = prepared(place, options)
    single = [sys.executable, "-m", "prunetune.cli", "run", str(recipe)]
    kind = ["--use_fsdp", "--fsdp_version", "2"] if options.fsdp else ["--multi_gpu"]
    accelerate = str(Path(sys.executable).parent / "accelerate")
    several = [accelerate, "launch", *kind, "--num_processes", str(options.processes), "-m", *single[2:]]
    said = finished([*single, "--out", str(place / "whole")])
    search, settle = options.steps // 4, options.steps // 2
    run = ["--out", str(place / "run")]
    started, lines = stopped([*several, *run], place / "run", search - 10, kill_rank=True)
    seconds = time.monotonic() - started
    _, told = stopped([*single, *run, "--resume"], place / "run", settle - 10)
    said = finished([*several, *run, "--resume"])
    plans = [(place / name / "plan.json").read_bytes() for name in ("whole", "run")]
    losses = [
        json.loads((place / name / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for name in ("whole", "run")
    ]
    return {
        "bar": "G3", "processes": options.processes, "fsdp": options.fsdp, "seconds to end": round(seconds, 1),
        "said": lines, "said by one": told, "finished": "report" in said, "same plan": plans[0] == plans[1],
        "last loss apart": abs(losses[0] - losses[1]),
    }  # fmt: skip


def prepared(place: Path, options: argparse.Namespace) -> Path:
    """A model, rows and a recipe."""
    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape, **heads)).save_pretrained(place / "dense")
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(place / "dense")
    rows = [{"prompt": f"{n % 60} {n % 7} ", "completion": f"{n % 7} {n % 60}", "task": "copy"} for n in range(400)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": str(place / "dense"), "device": options.device, "dtype": "float32",
        "data": {"train": [str(place / "rows.jsonl")]}, "budget": {"keep": 0.6, "align": 32},
        "distill": {"teacher": "none"},
        "train": {"steps": options.steps, "batch_size": 8, "checkpoint_every": 10, "weights": "adapters"},
        "lora": {"rank": 8}, "search": {"share": 0.25, "settle": 0.25, "batch_size": 8},
        "evaluate": {"limit": 4, "generate_limit": 0, "dense_tuned": False},
    }  # fmt: skip
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return place / "recipe.yaml"


def finished(command: list[str]) -> str:
    """Run it to its end."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def stopped(command: list[str], run: Path, step: int, *, kill_rank: bool = False) -> tuple[float, list[str]]:
    """End a run after `step`: its last rank by SIGKILL, or itself by SIGTERM; when, and its own lines."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and done(run) < step:
        time.sleep(0.1)
    if process.poll() is not None:
        raise SystemExit(f"it ended before it could be stopped: {process.communicate()[1][-6000:]}")
    started = time.monotonic()
    if kill_rank:
        os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    else:
        process.terminate()
    said = process.communicate()[1]
    return started, [line for line in said.splitlines() if line.startswith("prunetune:")]


def done(run: Path) -> int:
    """Steps on record."""
    file = run / "metrics.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the launcher's ranks, in order; a launcher may stand behind another process (a shell, say)."""
    parents, numbers = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment = (place / "environ").read_bytes().split(b"\0")
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        numbers |= {int(place.name): int(one[5:]) for one in environment if one.startswith(b"RANK=")}
    first: dict[int, int] = {}
    for process in sorted(numbers, key=lambda one: _depth(one, parents), reverse=True):
        if launcher in _above(process, parents):
            first[numbers[process]] = process  # the highest of its family: a rank's own children inherit its number
    return [first[rank] for rank in sorted(first)]


def _above(process: int, parents: dict[int, int]) -> list[int]:
    found = []
    while process in parents:
        process = parents[process]
        found.append(process)
    return found


def _depth(process: int, parents: dict[int, int]) -> int:
    return len(_above(process, parents))


if __name__ == "__main__":
    main()
