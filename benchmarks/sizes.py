"""Four sizes from one run against a run for each: what they cost, and how good each is (bar F5).

    python benchmarks/sizes.py recipes/legal.yaml --out runs/sizes -- --data.root DATA --model MODEL.gguf

makes OUT/several and OUT/0.8, OUT/0.6, ... (`--keeps`), as far as they are not there and where they were stopped, and
prints a table as JSON (OUT/sizes.json, too). What stands after `--` goes to every run. The teacher and the dense
models' scores are the same for all, so the dedicated runs are lent those of OUT/several. `--only 0.6` makes one folder,
`--read` none. `--small` needs no recipe: a byte-level model that is trained in a minute on a CPU (benchmarks/gates.py)
and tuned to sums.

Cost is seconds: `loop` of search, settling and tuning alone, from the log; `train` of all that is needed to tune,
with the teacher's, once for every run; `write` of that and of cutting, writing and checking. A difference of scores is
several minus dedicated, by task and as a mean over tasks, with the standard error over items paired between the two;
`within` says whether it is worse by one such error at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from prunetune.cli.app import app
from prunetune.cli.flags import flags_to_overrides
from prunetune.config.recipe import load_recipe
from prunetune.evaluation.results import Evaluation, headline_metric, higher_is_better
from prunetune.evaluation.statistics import paired_difference
from prunetune.pipeline.run import run
from prunetune.runs.folder import RunFolder, create_run_folder

METRICS = ("accuracy", "rouge_l", "nll", "perplexity")
SMALL: dict[str, Any] = {
    "data": {"template": "raw"},
    "train": {"steps": 120, "batch_size": 8, "validate_every": 60, "checkpoint_every": 60, "log_every": 60},
    "lora": {"rank": 16, "dense_rank": 16},
    "search": {"batch_size": 8, "init_batches": 4},
    "evaluate": {"limit": 100, "generate_limit": 0},
    "require": {"prompt": 64, "generate": 8, "runs": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="", help="or none, for --small")
    parser.add_argument("--keeps", default="0.8,0.6,0.5,0.4")
    parser.add_argument("--out", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--only", default="", help="several, or one of the keeps")
    parser.add_argument("--small", action="store_true", help="a byte-level model on a CPU")
    parser.add_argument("--read", action="store_true", help="make nothing, read what is there")
    words = sys.argv[1:]
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser.parse_args(own)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    keeps = sorted((float(keep) for keep in options.keeps.split(",")), reverse=True)
    if not options.read:
        recipe = small(options.out) if options.small else Path(options.recipe)
        places = {"several": options.keeps, **{f"{keep:g}": f"{keep:g}" for keep in keeps}}
        for name, keep in places.items():
            if options.only in ("", name):
                make(recipe, options.out / name, keep, flags, None if name == "several" else options.out / "several")
    if not options.only:
        table = json.dumps(compared(options.out, keeps), indent=1)
        (options.out / "sizes.json").write_text(table + "\n", encoding="utf-8")
        print(table)


def make(recipe: Path, out: Path, keep: str, flags: Sequence[str], lender: Path | None) -> None:
    """One run; gone on with where it was stopped, and left alone where it is done."""
    manifest = json.loads((out / "manifest.json").read_text()) if (out / "manifest.json").is_file() else {}
    if (out / "report.html").is_file() and manifest.get("failed") == "":
        return
    words = ["--keep", keep, "--out", str(out), *flags]
    found = app.parse_args(["run", str(recipe), *words], exit_on_error=False, print_error=False)[1]
    config = load_recipe(recipe, flags_to_overrides(found.arguments["flags"]))
    folder = RunFolder(out)
    if lender and not out.exists():
        create_run_folder(folder, config)
        lend(RunFolder(lender), folder)
    run(config, resume=out.exists(), command=shlex.join(["prunetune", "run", str(recipe), *words]))


def lend(lender: RunFolder, folder: RunFolder) -> None:
    """The dense tuned model and the dense models' scores, as far as they are there."""
    if lender.dense_tuned_checkpoints.is_dir():
        shutil.copytree(lender.dense_tuned_checkpoints, folder.dense_tuned_checkpoints)
    for name in ("dense", "tuned"):
        if lender.evaluation_file(name).exists():
            shutil.copyfile(lender.evaluation_file(name), folder.evaluation_file(name))


def small(out: Path) -> Path:
    """A recipe with a model and data of its own."""
    import gates

    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "small.yaml"
    model, rows = gates.small_model(out / "small"), gates.sums(out / "sums.jsonl")
    data = SMALL["data"] | {"train": [str(rows)]}
    recipe.write_text(yaml.safe_dump(SMALL | {"model": str(model), "data": data}), encoding="utf-8")
    return recipe


# -- cost ------------------------------------------------------------------------------------------------------------


def compared(out: Path, keeps: Sequence[float]) -> dict[str, Any]:
    """Cost and scores of both ways."""
    several = out / "several"
    teacher = RunFolder(several).read_manifest().timings["teacher"]
    dedicated = {f"{keep:g}": cost([out / f"{keep:g}"], teacher) for keep in keeps}
    ours = cost([several / "sizes" / f"{keep:g}" for keep in keeps], teacher)
    ratios = {}
    for kind in ("loop", "train", "write"):
        each = {name: ours[kind] / found[kind] for name, found in dedicated.items()}
        mean = ours[kind] * len(dedicated) / sum(found[kind] for found in dedicated.values())
        ratios[kind] = {"to_mean": mean, **{f"to_{name}": ratio for name, ratio in each.items()}}
    manifest = RunFolder(several).read_manifest()
    return {
        "device": manifest["device"],
        "commit": manifest.get("commit"),
        "cost_ratio": ratios,
        "seconds": {"teacher": teacher, "several": ours, "dedicated": dedicated},
        "sizes": {f"{keep:g}": quality(several / "sizes" / f"{keep:g}", out / f"{keep:g}") for keep in keeps},
    }


def cost(sizes: Sequence[Path], teacher: float) -> dict[str, Any]:
    """Seconds of all sizes of a run, one or several."""
    timings = [RunFolder(size).read_manifest().timings for size in sizes]
    train = teacher + sum(each["tune and prune"] for each in timings)
    loops = {size.name: loop(size / "metrics.jsonl") for size in sizes}
    write = train + sum(each["cut and check"] for each in timings)
    return {"loop": sum(loops.values()), "train": train, "write": write, "loops": loops}


def loop(file: Path) -> float:
    """Seconds in the loop: the log's clock begins anew where a run was resumed."""
    clock = [0.0, *(json.loads(line)["seconds"] for line in file.read_text().splitlines())]
    steps = itertools.pairwise(clock)
    return math.fsum(after - before if after >= before else after for before, after in steps)


# -- quality ---------------------------------------------------------------------------------------------------------


def quality(ours: Path, theirs: Path) -> dict[str, Any]:
    """Scores of a size beside those of the run that made nothing else."""
    one, other = (Evaluation.from_json((run / "evaluation" / "pruned.json").read_text()) for run in (ours, theirs))
    tasks: dict[str, Any] = {}
    sums: dict[str, list[tuple[float, float]]] = {}
    for task, result in one.tasks.items():
        for metric in dict.fromkeys((headline_metric(result), *(name for name in METRICS if name in result.scores))):
            found = paired_difference(result, other.tasks[task], metric)
            values = (result.scores[metric].value, other.tasks[task].scores[metric].value)
            tasks.setdefault(task, {})[metric] = verdict(metric, found.value, found.se) | {"scores": values}
            sums.setdefault(metric, []).append((found.value, found.se))
    means = {metric: mean(metric, found) for metric, found in sums.items()}
    plans = [json.loads((run / "manifest.json").read_text())["pruned"]["params"] for run in (ours, theirs)]
    return {"params": plans, "means": means, "tasks": tasks}


def mean(metric: str, found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Over tasks, which have no item in common."""
    value, se = math.fsum(value for value, _ in found), math.hypot(*(se for _, se in found))
    return verdict(metric, value / len(found), se / len(found)) | {"tasks": len(found)}


def verdict(metric: str, difference: float, se: float) -> dict[str, Any]:
    """A difference with its error, and whether it is worse by one error at most."""
    worse = -difference if higher_is_better(metric) else difference
    return {"difference": difference, "se": se, "within": worse <= se}


if __name__ == "__main__":
    main()
