"""At equal latency, is a model better that was pruned for latency than one for parameters (bar F4)? Or why not.

    python benchmarks/latency_target.py recipes/legal.yaml --out runs/latency -- --data.root DATA --model MODEL.gguf
    python benchmarks/latency_target.py --tiny --device cpu --out runs/tiny       # two minutes on two cores, to try it

makes OUT/keep (`--keep`, 0.6), has the latency table of this device tell what that model takes, and makes OUT/latency
with this as `budget.latency` and nothing else: so what the table is off by is off for both. Both models are then timed
in turns, and scored on valid, item by item. Runs that are there are not made again, and stopped ones gone on with. What
stands after `--` goes to both; the second is lent the first one's teacher, which is the same.

The workload: on an H100, steps of a model as small as SmolLM2-135M wait for launches unless they are replayed from a
CUDA graph, and so does a prefill of few tokens; where launching binds, no width helps. 16 prompts of 2,048 tokens and 8
written, steps recorded, keep the device busy.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from latency_reason import Place, of_time, reason, widths
from rows import give
from sizes import make, mean

from prunetune.bench.interleaved import paired_ratios, summary_stats
from prunetune.bench.latency.request_timing import time_requests
from prunetune.config.recipe import WorkloadConfig, load_recipe
from prunetune.data.splits import load_splits
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.score_records import evaluate
from prunetune.evaluation.statistics import paired_difference
from prunetune.model.loading import DTYPES, load_model_and_tokenizer, load_tokenizer, pick_device, pick_dtype
from prunetune.plan import Plan
from prunetune.runs.folder import RunFolder
from prunetune.utils import environment

NAMES = ("keep", "latency")
EQUAL = 0.01  # share that the second model may be slower and still count as equally fast


def main() -> None:
    """Both runs, what they take and lose, and one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, help="or none, for --tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/latency"))
    parser.add_argument("--workload", default="2048/8/16", help="tokens of a prompt, tokens written, batch")
    parser.add_argument("--phase", choices=["mix", "prefill", "decode"], default="mix")
    parser.add_argument("--keep", default="0.6")
    parser.add_argument("--rounds", type=int, default=7, help="in which both models are timed, 3 times each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and sums, 16/4/2")
    parser.add_argument("--rows", type=Path, help="append the row to this file")
    words = sys.argv[1:]
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    options = parser.parse_args(own)
    recipe = tiny(options) if options.tiny else options.recipe
    if recipe is None:
        parser.error("name a recipe, or --tiny")
    device = pick_device(options.device)
    flags += workload_flags(options, device)
    make(recipe, options.out / "keep", options.keep, flags, None)
    place = Place(load_recipe(options.out / "keep" / "config.yaml"), device, options.out / "table.json")
    limit = place.told(plan_of(options.out / "keep").widths())
    flags += ["--budget.latency", f"{1e3 * limit:.6f}ms", "--budget.table", str(place.table)]
    make(recipe, options.out / "latency", "1", flags, options.out / "keep")
    found = compared(place, options.out, options.rounds) | {"limit_s": limit}
    (options.out / "latency_target.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1), file=sys.stderr)
    give(row(found, place, recipe.stem), options.rows)


def tiny(options: argparse.Namespace) -> Path:
    """A random model, rows and a recipe."""
    from ranks_killed import prepared

    options.workload, options.rounds = "16/4/2", min(options.rounds, 3)
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = options.out / "recipe.yaml"
    return recipe if recipe.exists() else prepared(options.out, argparse.Namespace(device=options.device, steps=20))


def workload_flags(options: argparse.Namespace, device: torch.device) -> list[str]:
    """As both runs and the table are told."""
    prompt, generate, batch = options.workload.split("/")
    runtime, dtype = ("recorded", "bfloat16") if device.type == "cuda" else ("eager", "float32")
    told = {"prompt": prompt, "generate": generate, "batch": batch, "runtime": runtime, "dtype": dtype}
    told |= {"phase": options.phase}
    flags = [word for name, value in told.items() for word in (f"--workload.{name}", value)]
    return [*flags, "--device", options.device]


def plan_of(run: Path) -> Plan:
    """The units that a run kept."""
    return Plan.load(RunFolder(run).plan_file)


# -- what came out ---------------------------------------------------------------------------------------------------


def compared(place: Place, out: Path, rounds: int) -> dict[str, Any]:
    """Measured and told seconds, losses on valid, parameters, widths, and what the table says of time."""
    plans = {name: plan_of(out / name) for name in NAMES}
    runs = dict(zip(NAMES, in_turns(place, out, rounds), strict=True))
    ratio = summary_stats(paired_ratios(runs["latency"], runs["keep"]))
    loss, losses = on_valid(place, out)
    return {
        "measured_s": {name: statistics.median(runs[name]) for name in NAMES},
        "latency_over_keep": {"median": ratio.median, "min": ratio.min, "max": ratio.max, "rounds": rounds},
        "table_s": {name: place.told(plan.widths()) for name, plan in plans.items()}
        | {"dense": place.told(place.anatomy.dense_counts())},
        "valid_nll": losses,
        "valid_difference": loss,
        "last_validation": {name: last_validation(out / name) for name in NAMES},
        "params": {name: RunFolder(out / name).read_manifest().pruned.params for name in NAMES},
        "kept": {
            name: place.params(plan.widths()) / place.params(place.anatomy.dense_counts())
            for name, plan in plans.items()
        },
        "widths": {name: widths(place, plan) for name, plan in plans.items()},
        "time": of_time(place, plans["keep"]),
    }


def in_turns(place: Place, out: Path, rounds: int) -> list[list[float]]:
    """Seconds of the workload's phase, by model and round."""
    workload = place.config.workload
    models = [opened(place, out / name, DTYPES[workload.dtype]) for name in NAMES]
    found = [time_requests(models, workload, 3) for _ in range(rounds)]
    return [[whole(turn[number], workload) for turn in found] for number in range(len(models))]


def whole(seconds: dict[str, float], workload: WorkloadConfig) -> float:
    """Of the phase that the budget is about."""
    if workload.phase != "mix":
        return seconds[workload.phase]
    return seconds["prefill"] + (workload.generate - 1) * seconds["decode"]


def opened(place: Place, run: Path, dtype: torch.dtype) -> Any:
    """The finished model; its code, where it has some, is what the run wrote."""
    own = place.config.layout == "per-layer"
    return load_model_and_tokenizer(
        str(RunFolder(run).model_folder), device=place.device, dtype=dtype, trust_remote_code=own
    ).model


def on_valid(place: Place, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """NLL of answers, a mean over tasks: the difference with its paired error over items, and each model's."""
    config = place.config
    records = load_splits(config.data, config.seed).valid
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    asked, found = replace(config.evaluate, generate_limit=0), dict[str, Evaluation]()
    for name in NAMES:
        model = opened(place, out / name, pick_dtype(config.dtype, place.device))
        found[name] = evaluate(model, tokenizer, records, config.data, asked)
    keep, latency = (found[name].tasks for name in NAMES)
    tasks = [task for task in keep if "nll" in keep[task].scores]
    pairs = {task: paired_difference(latency[task], keep[task], "nll") for task in tasks}
    difference = mean("nll", [(one.value, one.se) for one in pairs.values()])
    each = {task: {"difference": one.value, "se": one.se, "items": one.n} for task, one in pairs.items()}
    return difference | {"by_task": each}, {name: found[name].mean_nll() for name in NAMES}


def last_validation(run: Path) -> float:
    """What the run itself saw last."""
    lines = (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["nll"]) if lines else math.nan


def row(found: dict[str, Any], place: Place, recipe: str) -> dict[str, Any]:
    """Of results.jsonl."""
    loss, ratio, losses = found["valid_difference"], found["latency_over_keep"], found["valid_nll"]
    config, work = place.config, place.config.workload
    return {
        "bar": "F4",
        "case": f"{Path(config.model).name}, {recipe}, seed {config.seed}, {work.batch} x ({work.prompt} + "
        f"{work.generate}) tokens, {work.phase}, {work.runtime}: NLL on valid of the latency-targeted minus the "
        f"parameter-targeted model ({losses['latency']:.4f}, {losses['keep']:.4f}; paired standard error "
        f"{loss['se']:.4f}) at {ratio['median']:.3f} times its measured time ({ratio['min']:.3f} to "
        f"{ratio['max']:.3f}; {1e3 * found['measured_s']['keep']:.2f} ms); {reason(found)}",
        "value": round(loss["difference"], 4),
        "target": f"< 0, and no slower than {1 + EQUAL:g}",
        "met": bool(loss["difference"] < 0 and ratio["median"] <= 1 + EQUAL),
        "unit": "nats per token",
        "device": environment.device_name(place.device),
        "command": shlex.join(["python", "benchmarks/latency_target.py", *sys.argv[1:]]),
        "commit": environment.installed_commit()[:7],
    }


if __name__ == "__main__":
    main()
