"""A grid of (domain, budget, method, seed, learning rate) on the GPUs of one machine, within a time, resumably.

    python benchmarks/quality/on_gpus.py VARIANTS.yaml --data DATA --model MODEL.gguf --out OUT --split test \
        --groups progressive,fisher wanda-sp,flap [--domains legal healthcare] [--keeps 0.6 0.4] [--seeds 0 1 2] \
        [--rates 5e-4 1e-3 2e-3] [--jobs 4] [--processes 3] [--gpus 0 1] [--seconds 540] [-- OPTIONS OF `compare`]

A comparison is one domain and one group of methods (OUT/legal-0, ...). Each GPU runs one comparison at a time, or
`--processes` of them, with `--jobs` cells at once, and takes the next one when it is done. Several processes on a GPU
need NVIDIA's MPS (start `nvidia-cuda-mps-control -d` before): with 3 of 5 jobs, an H200 does three times as many cells
as with one of 8. Each comparison begins with the dense model, its teacher, one for each seed, so few large groups cost
least. Of several rates each method that sets none gets its own, chosen on valid. At the end of the time all are
interrupted; the same command continues them. On valid the recipes are `benchmarks/quality/DOMAIN-valid.yaml`, else
`recipes/DOMAIN.yaml`.

Prints a line for each cell, and writes all cells of a domain with every item to OUT/DOMAIN.json (`merged.py`).
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from merged import read_results, write_results

from prunetune.compare.run import summary_line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=["valid", "test"], required=True)
    parser.add_argument("--groups", nargs="+", required=True, help="methods of a comparison, by commas")
    parser.add_argument("--domains", nargs="+", default=["legal", "healthcare"])
    parser.add_argument("--keeps", nargs="+", default=["0.6"])
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--rates", nargs="+", default=["1e-3"])
    parser.add_argument("--jobs", default="4", help="cells at once on each GPU")
    parser.add_argument("--processes", type=int, default=1, help="comparisons at once on each GPU, under MPS")
    parser.add_argument("--gpus", nargs="+", type=int, help="their numbers; default: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="until all are interrupted")
    words = sys.argv[1:]
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    arguments = parser.parse_args(own)
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    for number in range(len(arguments.groups)):  # group by group, so that the domains advance together
        for domain in arguments.domains:
            waiting.put((domain, number))

    def work(gpu: int) -> None:
        while time.monotonic() < end:
            try:
                domain, number = waiting.get_nowait()
            except queue.Empty:
                return
            run_until(command(arguments, domain, number, options), arguments.out / f"{domain}-{number}.log", gpu, end)

    gpus = arguments.gpus or list(range(torch.cuda.device_count())) or [0]
    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus * arguments.processes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for domain in arguments.domains:
        folders = [arguments.out / f"{domain}-{number}" for number in range(len(arguments.groups))]
        if found := [folder for folder in folders if any(folder.glob("cells/*.json"))]:
            results = read_results(found)
            write_results(arguments.out / f"{domain}.json", results)
            for cell in results.cells:
                print(domain, summary_line(cell))


def command(arguments: argparse.Namespace, domain: str, number: int, options: Sequence[str]) -> list[str]:
    """The command line of one comparison; it continues where its folder exists."""
    out = arguments.out / f"{domain}-{number}"
    recipe = f"benchmarks/quality/{domain}-valid.yaml" if arguments.split == "valid" else f"recipes/{domain}.yaml"
    words = [sys.executable, "-m", "prunetune.cli", "compare", recipe, "--out", str(out)]
    words += ["--data.root", arguments.data, "--model", arguments.model, "--compare.split", arguments.split]
    methods = ["dense", *arguments.groups[number].split(",")]
    words += ["--compare.jobs", arguments.jobs]
    if (
        not yaml.safe_load(arguments.variants.read_text(encoding="utf-8")).keys().isdisjoint(methods)
    ):  # a group that names none would get them all
        words += ["--compare.variants", str(arguments.variants)]
    for name, values in (
        ("methods", methods),
        ("keeps", arguments.keeps),
        ("seeds", arguments.seeds),
        ("learning-rates", arguments.rates),
    ):
        words += [word for value in values for word in (f"--compare.{name}", value)]
    return [*words, *(["--resume"] if out.exists() else []), *options]


def run_until(words: Sequence[str], log_file: Path, gpu: int, end: float) -> None:
    """Run a command on one GPU; interrupt it at the end of the time, and kill it where that does not help."""
    with log_file.open("ab") as log:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    for sent, seconds in ((signal.SIGINT, end - time.monotonic()), (signal.SIGKILL, 10.0)):
        try:
            process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(sent)
    process.wait()
    if process.returncode not in (0, -signal.SIGINT, 130):
        print(f"{log_file}: exit code {process.returncode}")


if __name__ == "__main__":
    main()
