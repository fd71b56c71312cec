"""Comparisons in two processes that share a GPU: does one crash, and are figures those of a process alone (bar N4)?

    python benchmarks/reliability/comparisons_side_by_side.py RECIPE.yaml --out OUT [--comparisons 40] [--alone 2]
        [--processes 2] [--result benchmarks/results.jsonl] [-- --data.root DATA --model MODEL]

A comparison has three cells at once, seeds 0 to 2 of progressive removal with 60% kept, 24 steps, a teacher each. First
one process makes `--alone` of them, then `--processes` make `--comparisons` together. A figure is a seed's mean loss on
the items scored; what one seed twice differs by is the largest difference of a seed between comparisons made alone.
Crashes are processes that end in any way but well. Without MPS: that is where crashes were seen.
With `-- --deterministic true` one seed gives the same bits, so that any difference is a fault.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import give

SETTINGS = """
compare: {methods: [progressive], keeps: [0.6], seeds: [0, 1, 2], jobs: 3}
train: {steps: 24, validate_every: 24}
evaluate: {limit: 25, generate_limit: 0}
data: {general: []}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--comparisons", type=int, default=40)
    parser.add_argument("--alone", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("NAME", "COUNT"), help=argparse.SUPPRESS)
    words = sys.argv[1:]
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    given = parser.parse_args(own)
    if given.child:
        make_comparisons(given.recipe, given.out, given.child[0], int(given.child[1]), options)
        return
    given.out.mkdir(parents=True, exist_ok=True)
    counts = [given.comparisons // given.processes] * given.processes
    counts[0] += given.comparisons - sum(counts)
    crashed = start([("alone", given.alone)], given, options)
    crashed += start([(f"beside-{index}", count) for index, count in enumerate(counts)], given, options)
    report(given, crashed, options)


def start(children: list[tuple[str, int]], given: argparse.Namespace, options: list[str]) -> int:
    """Run these processes side by side; how many did not end well."""
    started = []
    for name, count in children:
        words = [sys.executable, __file__, given.recipe, "--out", str(given.out), "--child", name, str(count), "--"]
        with (given.out / f"{name}.log").open("w") as log:
            started.append(subprocess.Popen([*words, *options], stdout=log, stderr=subprocess.STDOUT))
    return sum(process.wait() != 0 for process in started)


def make_comparisons(recipe: str, out: Path, name: str, count: int, options: list[str]) -> None:
    """So many comparisons in this process, one after the other, each in a folder of its own."""
    from prunetune.compare.run import compare
    from prunetune.config.fields import merge_mappings
    from prunetune.config.recipe import load_recipe

    changes = yaml.safe_load(SETTINGS)
    for path, value in zip(options[::2], options[1::2], strict=True):
        change: Any = yaml.safe_load(value)
        for key in reversed(path.removeprefix("--").split(".")):
            change = {key: change}
        changes = merge_mappings(changes, change)
    for index in range(count):
        compare(load_recipe(Path(recipe), {**changes, "out": str(out / f"{name}-{index}")}))


def figures(folder: Path) -> dict[int, float]:
    """Mean loss of each seed's cell of a comparison."""
    cells = [json.loads(path.read_text()) for path in folder.glob("cells/*.json")]
    return {cell["seed"]: cell["headline"]["nll"] for cell in cells if "headline" in cell}


def largest_difference(first: list[dict[int, float]], second: list[dict[int, float]]) -> float:
    """Between a seed's figures in the one and in the other."""
    pairs = itertools.product(first, second)
    return max((abs(one[seed] - other[seed]) for one, other in pairs for seed in one.keys() & other.keys()), default=0)


def report(given: argparse.Namespace, crashed: int, options: list[str]) -> None:
    import torch

    from prunetune.utils.environment import device_name, installed_commit

    for folder in sorted(given.out.glob("*-*/")):  # so that one that stands out is seen
        print(folder.name, {seed: round(loss, 4) for seed, loss in sorted(figures(folder).items())})
    alone = [figures(folder) for folder in sorted(given.out.glob("alone-*/"))]
    beside = [figures(folder) for folder in sorted(given.out.glob("beside-*/"))]
    whole = [found for found in beside if len(found) == 3]
    twice, differs = largest_difference(alone, alone), largest_difference(alone, beside)
    row = {
        "unit": "comparisons", "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "command": f"comparisons_side_by_side.py {Path(given.recipe).name} --comparisons {given.comparisons} "
        f"--processes {given.processes}", "commit": installed_commit(), "final": False,
    }  # fmt: skip
    case = f"comparisons of three cells, {given.processes} processes on a GPU, that ended well ({crashed} crashes)"
    met = not crashed and len(whole) == given.comparisons
    give({"bar": "N4", "case": case, "value": len(whole), "target": given.comparisons, "met": met, **row}, given.result)
    case = f"largest difference of a seed's loss from a process alone (one seed twice alone: {twice:.6f})"
    row = {**row, "unit": "nats"}
    give({"bar": "N4", "case": case, "value": differs, "target": twice, "met": differs <= twice, **row}, given.result)


if __name__ == "__main__":
    main()
