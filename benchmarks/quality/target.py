"""Q1: does `budget.quality` end with a model that keeps its quality on test, and would the next size not have?

    python benchmarks/quality/target.py recipes/{legal,healthcare}.yaml --out OUT [--qualities 0.99 0.97 0.95]
        [--jobs 4] [--result benchmarks/results.jsonl] [-- OPTIONS OF `run`]

Every run is a process of its own, `--jobs` at once. Whenever a run judges a stage on valid, the same model is scored on
test, too, which decides nothing: so the model that was kept and the one that was given up both have scores there. One
run without a target, of the same steps and ending at the size that the run of the middle quality ended at, says what
a target costs. Prints a line for each run; rows hold or fail by one paired standard error, as in the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import give

from prunetune.evaluation.results import Evaluation
from prunetune.pipeline.monitor import kept_quality

CHILD = """
import sys
from pathlib import Path
from prunetune.cli.app import main
from prunetune.pipeline.monitor import ValidationMonitor
folder, score_valid = Path(sys.argv.pop(1)), ValidationMonitor.score_valid
folder.mkdir(parents=True, exist_ok=True)
def score_both(self, model):
    test = self._evaluate(model, self.context.splits.test, self.context.config.evaluate.limit)
    (folder / f"{len(list(folder.iterdir())):02}.json").write_text(test.to_json())
    return score_valid(self, model)
ValidationMonitor.score_valid = score_both
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--qualities", nargs="+", type=float, default=[0.99, 0.97, 0.95])
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--result", type=Path)
    words = sys.argv[1:]
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    given = parser.parse_args(own)
    given.out.mkdir(parents=True, exist_ok=True)
    targets = [(recipe, quality) for recipe in given.recipes for quality in given.qualities]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda target: run(given.out, *target, options), targets))
        plain = list(pool.map(lambda recipe: run_plain(given, recipe, options), given.recipes))
    found = [judged(given.out, recipe, quality) for recipe, quality in targets]
    for one in found:
        print(json.dumps(one))
    for recipe, seconds in zip(given.recipes, plain, strict=True):
        slowest = max(one["seconds"] for one in found if one["run"].startswith(recipe.stem))
        print(json.dumps({"recipe": recipe.stem, "seconds of a run": seconds, "most of a target's": slowest}))
    right = sum(one["holds"] and one["next holds"] is not True for one in found)
    case = f"runs that keep their quality on test, and whose next size does not, of {len(found)}"
    row = {
        "bar": "Q1", "case": case, "value": right, "target": ">= 5", "met": right >= 5, "unit": "runs",
        "device": "", "command": f"python {' '.join(sys.argv)}", "commit": "", "final": False,
    }  # fmt: skip
    give(row, given.result)


def name_of(recipe: Path, quality: float) -> str:
    return f"{recipe.stem}-{quality:g}"


def run(out: Path, recipe: Path, quality: float, options: list[str]) -> None:
    """One run with a target; its scores on test in a folder beside it."""
    name = name_of(recipe, quality)
    command = [sys.executable, "-c", CHILD, str(out / f"{name}-test"), "run", str(recipe), "--out", str(out / name)]
    with (out / f"{name}.log").open("w") as log:  # a run in which no smaller model keeps its quality exits with 1
        subprocess.run([*command, "--budget.quality", str(quality), *options], stdout=log, stderr=log, check=False)


def run_plain(given: argparse.Namespace, recipe: Path, options: list[str]) -> float:
    """Seconds of tuning of a run without a target, to the size that the middle quality led to."""
    middle = sorted(given.qualities)[len(given.qualities) // 2]
    keep = manifest_of(given.out / name_of(recipe, middle))["gates"]["kept"] or 0.9
    out = given.out / f"{recipe.stem}-plain"
    command = [sys.executable, "-m", "prunetune.cli", "run", str(recipe), "--out", str(out), "--budget.keep", str(keep)]
    with (given.out / f"{recipe.stem}-plain.log").open("w") as log:
        subprocess.run([*command, *options], stdout=log, stderr=log, check=True)
    return float(manifest_of(out)["timings"]["train"])


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def judged(out: Path, recipe: Path, quality: float) -> dict[str, Any]:
    """What the run ended with, and whether it and the size that it gave up keep the quality on test."""
    name = name_of(recipe, quality)
    manifest = manifest_of(out / name)
    files = sorted((out / f"{name}-test").iterdir())  # the tuned dense model's, each stage's, the last step's
    dense, *stages = (Evaluation.from_json(file.read_text()) for file in files)
    shares = [min(kept_quality(stage, dense).values()) for stage in stages]
    went_back = bool(manifest["gates"]["events"])
    broken = None
    if went_back:
        judged_steps = [json.loads(line) for line in (out / name / "validation.jsonl").read_text().splitlines()]
        order = [line["valid.quality"] for line in judged_steps if "valid.quality" in line]
        broken = next((index for index, value in enumerate(order) if value < quality), None)
    return {
        "run": name, "kept": manifest["gates"]["kept"], "on test": [round(share, 4) for share in shares],
        "holds": shares[-1] >= quality, "next holds": None if broken is None else shares[broken] >= quality,
        "seconds": manifest["timings"].get("train"), "failed": manifest.get("failed", ""),
    }  # fmt: skip


if __name__ == "__main__":
    main()
