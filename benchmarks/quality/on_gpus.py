"""Cells of a comparison, spread over the GPUs of one machine within a time: B1 to B7 are made of them.

    python benchmarks/quality/on_gpus.py benchmarks/quality/general.yaml --data DATA --model MODEL.gguf --out OUT \
        --split valid --groups one-stage-1e-3,joint still-5e-3,share-10 [--keeps 0.6] [--seeds 0] [--seconds 540]
        [--domains legal healthcare] [--rates 5e-4] [--jobs 4] [--gpus 0 1] [--no-dense] [-- WORDS OF EVERY COMPARISON]

Starts `prunetune compare` for every domain and group of methods (OUT/legal-0, ...), spread over the GPUs, all at once;
each makes its own dense model, which teaches (`--no-dense` where none is taught). What does not end in time is
interrupted, and goes on when the same command is given again. On valid the recipes are
`benchmarks/quality/DOMAIN-valid.yaml`, else `recipes/DOMAIN.yaml`. Of several rates each method that brings none along
gets its own, chosen on valid.
Prints a line for each cell that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from prunetune.compare.run import summary_line


def main() -> None:
    """Start, wait, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=["valid", "test"], required=True)
    parser.add_argument("--keeps", nargs="+", default=["0.6"])
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--groups", nargs="+", required=True, help="methods by commas")
    parser.add_argument("--domains", nargs="+", default=["legal", "healthcare"])
    parser.add_argument("--rates", nargs="+", default=["5e-4"], help="of dense, and of all that bring none along")
    parser.add_argument("--jobs", default="4", help="cells at once in each process")
    parser.add_argument("--gpus", nargs="+", type=int, help="their numbers; all of them")
    parser.add_argument("--no-dense", action="store_true", help="do not score the dense model")
    parser.add_argument("--seconds", type=float, default=1e9, help="until all are interrupted")
    words = sys.argv[1:]
    own, others = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    told = parser.parse_args(own)
    ends = time.monotonic() + told.seconds
    gpus = told.gpus or list(range(torch.cuda.device_count())) or [0]
    running = [start(told, *each, others) for each in spread(told, gpus)]
    for process in running:
        ended(process, ends)
    for line in cells(told.out):
        print(line)


def spread(told: argparse.Namespace, gpus: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """(domain, number of the group, GPU): a domain's groups share a GPU where there are as many domains as GPUs."""
    for number in range(len(told.groups)):
        for place, domain in enumerate(told.domains):
            turn = place if len(told.domains) >= len(gpus) else place + number * len(told.domains)
            yield domain, number, gpus[turn % len(gpus)]


def start(
    told: argparse.Namespace, domain: str, number: int, gpu: int, others: Sequence[str]
) -> subprocess.Popen[bytes]:
    """One comparison, its words in OUT/DOMAIN-NUMBER.log."""
    out = told.out / f"{domain}-{number}"
    recipe = f"benchmarks/quality/{domain}-valid.yaml" if told.split == "valid" else f"recipes/{domain}.yaml"
    methods = [*([] if told.no_dense else ["dense"]), *told.groups[number].split(",")]
    words = [sys.executable, "-m", "prunetune.cli", "compare", recipe, "--out", str(out), "--data.root", told.data]
    words += ["--model", told.model, "--compare.variants", str(told.variants), "--compare.split", told.split]
    words += ["--compare.jobs", told.jobs]
    values_of = {"methods": methods, "keeps": told.keeps, "seeds": told.seeds, "learning-rates": told.rates}
    for name, values in values_of.items():
        words += [word for value in values for word in (f"--compare.{name}", value)]
    words += ["--resume"] if out.exists() else []
    told.out.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("ab") as log:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        return subprocess.Popen([*words, *others], env=environment, stdout=log, stderr=log)


def ended(process: subprocess.Popen[bytes], ends: float) -> None:
    """Waits for it, interrupts it at the end of the time, and kills it where it does not heed."""
    for sent, seconds in ((signal.SIGINT, ends - time.monotonic()), (signal.SIGKILL, 10.0)):
        try:
            process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(sent)


def cells(out: Path) -> Iterator[str]:
    """A line for each."""
    for file in sorted(out.glob("*/cells/*.json")):
        yield f"{file.parent.parent.name} {summary_line(json.loads(file.read_text(encoding='utf-8')))}"


if __name__ == "__main__":
    main()
