"""Cells of comparisons on the GPUs of one machine: one queue, several processes a GPU, within a time, resumably.

    python benchmarks/quality/on_gpus.py CELLS.yaml --data DATA --model MODEL.gguf --out OUT --split test
        [--domains legal healthcare] [--variants VARIANTS.yaml] [--processes 4] [--jobs 4] [--gpus 0 1] [--seconds 540]
        [-- OPTIONS OF `compare`]

CELLS.yaml is a list of blocks in their order of work, each the grid of its lists; `domains` is optional, and cells have
written answers where the block says `generate`:

    - {methods: [obs], keeps: [0.6, 0.4], rates: [1e-3, 2e-3], seeds: [0, 1, 2], domains: [legal], generate: true}

Each process works on one domain with `--jobs` cells at once, then helps with the next one. Several processes on a GPU
need NVIDIA's MPS (start `nvidia-cuda-mps-control -d` before). Four of 4 jobs fill an H200; a fifth ran out of its
memory. The tuned dense model of a seed (at `--teacher-rate`) is the teacher of all its cells: the process
that needs it first makes it, the others load it. At the end of the time all are interrupted; the same command goes on
with what is not done. On valid the recipes are `benchmarks/quality/DOMAIN-valid.yaml`, else `recipes/DOMAIN.yaml`.

Cells are files of OUT/DOMAIN/cells, as a comparison's. Prints a line for each, and writes all of a domain with every
item to OUT/DOMAIN.json (`merged.py`).
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from merged import read_results, write_results
from safetensors.torch import load_file, save_file
from torch.nn.attention import sdpa_kernel

from prunetune.cli.app import app
from prunetune.cli.flags import flags_to_overrides
from prunetune.compare.cell import CellRunner, TunedDenseModel
from prunetune.compare.grid import Cell, CellStore, Grid
from prunetune.compare.methods import resolve_methods
from prunetune.compare.run import _Comparison, summary_line
from prunetune.config.recipe import RunConfig, load_recipe
from prunetune.evaluation.scoring_mode import SDPA_BACKENDS
from prunetune.model.loading import pick_device
from prunetune.pipeline.prepare import RunContext, prepare
from prunetune.pruning.units import dense_plan
from prunetune.utils.console import make_console
from prunetune.utils.determinism import deterministic
from prunetune.utils.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=["valid", "test"], required=True)
    parser.add_argument("--domains", nargs="+", default=["legal", "healthcare"])
    parser.add_argument("--variants", help="methods of one's own, as `compare` takes them")
    parser.add_argument("--teacher-rate", type=float, default=5e-4, help="of the tuned dense model")
    parser.add_argument("--jobs", type=int, default=4, help="cells at once in each process")
    parser.add_argument("--processes", type=int, default=1, help="on each GPU, under MPS")
    parser.add_argument("--gpus", nargs="+", type=int, help="their numbers; default: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="until all are interrupted")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    words = sys.argv[1:]
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    arguments = parser.parse_args(own)
    if arguments.worker is not None:
        work(arguments, options)
        return
    for domain in arguments.domains:
        folder = arguments.out / domain
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        failed = [file for file in (folder / "cells").iterdir() if "error" in json.loads(file.read_text())]
        for left_over in [*failed, *folder.glob("*.claim")]:
            left_over.unlink()
        origin = {"model": arguments.model, "compare": {"split": arguments.split}}
        write_text(folder / "config.yaml", yaml.safe_dump(origin))
    gpus = arguments.gpus or list(range(torch.cuda.device_count())) or [0]
    end = time.monotonic() + arguments.seconds
    with ThreadPoolExecutor(len(gpus) * arguments.processes) as pool:
        for number in range(len(gpus) * arguments.processes):
            command = [sys.executable, __file__, *own, "--worker", str(number), "--", *options]
            pool.submit(run_until, command, arguments.out / f"worker-{number}.log", gpus[number % len(gpus)], end)
    for domain in arguments.domains:
        if any((arguments.out / domain).glob("cells/*.json")):
            results = read_results([arguments.out / domain])
            write_results(arguments.out / f"{domain}.json", results)
            for cell in results.cells:
                print(domain, summary_line(cell))


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


# -- one process -----------------------------------------------------------------------------------------------------


def work(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """Run cells of one domain until none is left that no other process has, then of the next domain."""
    domains = arguments.domains
    first = arguments.worker % len(domains)
    for domain in domains[first:] + domains[:first]:
        recipe = f"benchmarks/quality/{domain}-valid.yaml" if arguments.split == "valid" else f"recipes/{domain}.yaml"
        out = arguments.out / domain
        words = ["--data.root", arguments.data, "--model", arguments.model, "--compare.split", arguments.split]
        words += ["--out", str(out / f"worker-{arguments.worker}"), *options]  # never written
        if arguments.variants:
            words += ["--compare.variants", arguments.variants]
        found = app.parse_args(["compare", recipe, *words], exit_on_error=False, print_error=False)[1]
        overrides = flags_to_overrides(found.arguments["flags"])
        blocks = [
            block for block in yaml.safe_load(arguments.cells.read_text()) if domain in block.get("domains", domain)
        ]
        methods = list(dict.fromkeys(name for block in blocks for name in block["methods"]))
        config = load_recipe(Path(recipe), overrides | {"compare": overrides["compare"] | {"methods": methods}})
        console = make_console(config.train.log_every)
        with (
            closing(console),
            sdpa_kernel(SDPA_BACKENDS),
            deterministic(config.deterministic, pick_device(config.device)),
        ):
            context = prepare(config, resume=False, console=console)
            context = replace(context, config=context.reported_config)
            run_cells(arguments, context, config, list(read_cells(blocks, config)), out)


@dataclass(frozen=True)
class Task:
    """A cell, and whether its model writes answers."""

    cell: Cell
    generate: bool


def read_cells(blocks: Sequence[dict[str, Any]], config: RunConfig) -> Iterator[Task]:
    """The cells of all blocks, in their order of work."""
    methods = {method.name: method for method in resolve_methods(config)}
    for block in blocks:
        for seed in block.get("seeds", [0]):
            for keep in block.get("keeps", [1.0]):
                for name in block["methods"]:
                    for rate in block.get("rates", [methods[name].own_learning_rate]):
                        share = 1.0 if methods[name].is_dense else float(keep)
                        cell = Cell(methods[name], share, int(seed), float(rate))
                        yield Task(cell, bool(block.get("generate")))


def run_cells(
    arguments: argparse.Namespace, context: RunContext, config: RunConfig, tasks: Sequence[Task], out: Path
) -> None:
    """Run the cells that are not done and that no other process has, some at once."""
    store = CellStore(out)
    written = frozenset(task.cell.name for task in tasks if task.generate)
    runner = SharedTeachers(context, arguments.teacher_rate, folder=out, written=written)
    comparison = _Comparison(context, (), Grid((), (), ()), store)
    remaining = iter(tasks)

    def run_next() -> None:
        for task in remaining:
            claim = out / f"{task.cell.name}.claim"
            if (out / "cells" / f"{task.cell.name}.json").exists():
                continue
            try:
                claim.touch(exist_ok=False)
            except FileExistsError:
                continue
            comparison._run_cell(runner, task.cell, needs_valid_nll=False)

    if all((out / "cells" / f"{task.cell.name}.json").exists() for task in tasks):
        return
    runner.load_model(concurrent=arguments.jobs > 1)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for future in [pool.submit(run_next) for _ in range(arguments.jobs)]:
                future.result()
        except BaseException:
            runner.stop_event.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass
class SharedTeachers(CellRunner):
    """A runner whose tuned dense models are files that all processes share."""

    folder: Path = field(kw_only=True)
    written: frozenset[str] = field(kw_only=True)  # cells whose models write answers

    def cell_context(self, cell: Cell) -> RunContext:
        context = super().cell_context(cell)
        if cell.name in self.written:
            return context
        return replace(
            context, config=replace(context.config, evaluate=replace(context.config.evaluate, generate_limit=0))
        )

    def _tune_dense(self, tuned: TunedDenseModel, seed: int, rate: float) -> None:
        file = self.folder / f"teacher-{seed}-{rate:g}.safetensors"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                super()._tune_dense(tuned, seed, rate)
                assert tuned.model is not None
                save_file({name: weight.detach().contiguous() for name, weight in tuned.model.named_parameters()}, file)
                facts = {"seconds": tuned.seconds, "curve": tuned.curve}
                write_text(file.with_suffix(".json"), json.dumps(facts))
                return
        facts = json.loads(file.with_suffix(".json").read_text())
        tuned.seconds, tuned.curve, tuned.plan = facts["seconds"], facts["curve"], dense_plan(self.context.sites)
        model = copy.deepcopy(self.model)
        weights, own = load_file(file), dict(model.named_parameters())
        assert weights.keys() == own.keys(), "the tuned dense model has other weights than the model"
        for name, weight in own.items():
            weight.data = weights[name].to(weight.device)
        tuned.model = model.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
