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
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rows import give
from sizes import make, mean

from prunetune import environment
from prunetune.bench.spread import paired_ratios, spread
from prunetune.budget.anatomy import Anatomy, anatomy_of
from prunetune.budget.costs import Costs, total
from prunetune.budget.kinds import costs_of
from prunetune.config import RunConfig, WorkloadConfig, load_recipe
from prunetune.data.splits import load_splits
from prunetune.decide.select import Shape, select
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.statistics import paired_difference
from prunetune.evaluation.suite import evaluate
from prunetune.folder import RunFolder
from prunetune.model.loading import DTYPES, ghost, load, load_tokenizer, pick_device, pick_dtype
from prunetune.model.sites import Site, find_sites
from prunetune.plan import Plan
from prunetune.setting import shape_of
from prunetune.timing.clocks import seconds_of
from prunetune.timing.tables import table_for

NAMES = ("keep", "latency")
EQUAL = 0.01  # share that the second model may be slower and still count as equally fast
TRIES = 200  # random plans of as many parameters


@dataclass(frozen=True)
class Place:
    """The dense model, and what this device takes for it."""

    config: RunConfig
    device: torch.device
    table: Path  # measured once, and kept for whoever goes on

    @cached_property
    def structure(self) -> Any:
        """On the meta device."""
        return ghost(self.config.model, trust_remote_code=self.config.trust_remote_code)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """What may go."""
        return find_sites(self.structure, self.config.budget.units)

    @cached_property
    def shape(self) -> Shape:
        """What a plan may look like."""
        return shape_of(self.config, self.sites, self.structure.config)

    @cached_property
    def anatomy(self) -> Anatomy:
        """What plans cost by."""
        return anatomy_of(self.structure, self.sites)

    @cached_property
    def costs(self) -> Costs:
        """Seconds by the table of this device."""
        workload, given = self.config.workload, str(self.table) if self.table.exists() else ""
        table = table_for(self.structure.config, self.sites, workload, self.device, self.shape.align, given)
        self.table.write_text(table.to_json() + "\n", encoding="utf-8")
        return costs_of("latency", self.anatomy, workload, table)

    def told(self, counts: dict[str, int]) -> float:
        """Seconds by the table."""
        return max(total(cost, counts) for cost in self.costs)

    def params(self, counts: dict[str, int]) -> int:
        """Prunable ones."""
        return sum(counts[site.name] * site.unit_params for site in self.sites)


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
    return Plan.load(RunFolder(run).plan)


# -- what came out ---------------------------------------------------------------------------------------------------


def compared(place: Place, out: Path, rounds: int) -> dict[str, Any]:
    """Measured and told seconds, losses on valid, parameters, widths, and what the table says of time."""
    plans = {name: plan_of(out / name) for name in NAMES}
    runs = dict(zip(NAMES, in_turns(place, out, rounds), strict=True))
    ratio = spread(paired_ratios(runs["latency"], runs["keep"]))
    loss, losses = on_valid(place, out)
    return {
        "measured_s": {name: statistics.median(runs[name]) for name in NAMES},
        "latency_over_keep": {"median": ratio.median, "min": ratio.min, "max": ratio.max, "rounds": rounds},
        "table_s": {name: place.told(plan.widths()) for name, plan in plans.items()}
        | {"dense": place.told(place.anatomy.dense())},
        "valid_nll": losses,
        "valid_difference": loss,
        "last_validation": {name: last_validation(out / name) for name in NAMES},
        "params": {name: RunFolder(out / name).manifest()["pruned"]["params"] for name in NAMES},
        "kept": {
            name: place.params(plan.widths()) / place.params(place.anatomy.dense()) for name, plan in plans.items()
        },
        "widths": {name: widths(place, plan) for name, plan in plans.items()},
        "time": of_time(place, plans["keep"]),
    }


def in_turns(place: Place, out: Path, rounds: int) -> list[list[float]]:
    """Seconds of the workload's phase, by model and round."""
    workload = place.config.workload
    models = [opened(place, out / name, DTYPES[workload.dtype]) for name in NAMES]
    found = [seconds_of(models, workload, 3) for _ in range(rounds)]
    return [[whole(turn[number], workload) for turn in found] for number in range(len(models))]


def whole(seconds: dict[str, float], workload: WorkloadConfig) -> float:
    """Of the phase that the budget is about."""
    if workload.phase != "mix":
        return seconds[workload.phase]
    return seconds["prefill"] + (workload.generate - 1) * seconds["decode"]


def opened(place: Place, run: Path, dtype: torch.dtype) -> Any:
    """The finished model; its code, where it has some, is what the run wrote."""
    own = place.config.layout == "per-layer"
    return load(str(RunFolder(run).model), device=place.device, dtype=dtype, trust_remote_code=own).model


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


def widths(place: Place, plan: Plan) -> dict[str, Any]:
    """By kind, from the first layer to the last, and the share of it that is left."""
    found: dict[str, Any] = {}
    for kind in dict.fromkeys(site.kind for site in place.sites):
        sites = [site for site in place.sites if site.kind == kind]
        kept = [len(plan.kept[site.name]) for site in sites]
        found[kind] = {"layers": kept, "kept": sum(kept) / sum(site.units for site in sites)}
    return found


# -- why -------------------------------------------------------------------------------------------------------------


def of_time(place: Place, keep: Plan) -> dict[str, Any]:
    """Whether time follows parameters, by the table: what a parameter of each kind takes, and how plans scatter."""
    dense = place.anatomy.dense()
    each = {}
    for kind in dict.fromkeys(site.kind for site in place.sites):
        half = {site.name: site.units // 2 for site in place.sites if site.kind == kind}
        less = dense | {name: max(1, units) for name, units in half.items()}
        if gone := place.params(dense) - place.params(less):
            each[kind] = 1e12 * (place.told(dense) - place.told(less)) / gone
    share, rng = place.params(keep.widths()) / place.params(dense), torch.Generator().manual_seed(0)
    told = [place.told(random_plan(place, share, rng).widths()) for _ in range(TRIES)]
    longest: Any = max(place.costs, key=lambda cost: total(cost, keep.widths()))
    return {
        "us_per_million_params": each,
        "random_plans_s": {"median": statistics.median(told), "min": min(told), "max": max(told)},
        "outside_layers": longest.fixed / total(longest, dense),
        "binds": [track for track, _ in longest.tracks],
    }


def random_plan(place: Place, share: float, rng: torch.Generator) -> Plan:
    """Of as many parameters, with sites apart and a random taste for each kind."""
    taste = {kind: 2 * torch.randn(1, generator=rng) for kind in dict.fromkeys(site.kind for site in place.sites)}
    scores = {
        site.name: torch.randn(site.units, generator=rng) + torch.randn(1, generator=rng) + taste[site.kind]
        for site in place.sites
    }
    return select(scores, place.sites, share, place.shape)


def reason(found: dict[str, Any]) -> str:
    """In words."""
    time, kept = found["time"], found["kept"]
    rates = ", ".join(f"{kind} {value:.2f}" for kind, value in time["us_per_million_params"].items())
    random, dense = time["random_plans_s"], found["table_s"]["dense"]
    return (
        f"us per million parameters by the table: {rates}; random plans of as many parameters take "
        f"{1e3 * random['min']:.2f} to {1e3 * random['max']:.2f} ms (dense {1e3 * dense:.2f}, of it "
        f"{time['outside_layers']:.0%} outside the layers; {' and '.join(time['binds'])} bind); "
        f"the latency target keeps {kept['latency']:.1%} of the parameters for {kept['keep']:.1%}, " + ", ".join(
            f"{kind} {found['widths']['latency'][kind]['kept']:.0%} for {found['widths']['keep'][kind]['kept']:.0%}"
            for kind in found["widths"]["keep"]
        )
    )  # fmt: skip


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
        "device": environment.describe(place.device),
        "command": shlex.join(["python", "benchmarks/latency_target.py", *sys.argv[1:]]),
        "commit": environment.commit()[:7],
    }


if __name__ == "__main__":
    main()
