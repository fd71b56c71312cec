"""Bars M1 to M5 from files of results: what progressive removal leads by, what is left to dense, what is forgotten.

    python benchmarks/quality/lead.py legal=OUT/legal.json healthcare=OUT/healthcare.json --command COMMAND \
        [--case "uniform"] [--variant uniform] [--keeps 0.4] [--final] [--out benchmarks/results.jsonl]

Every two-stage method in a file had the same help. The best of them is the one of lowest nll at that budget over the
seeds that all have. Differences are paired; their error is the larger of that over items and that over seeds. With
`--variant uniform` only `progressive-uniform`, `obs-uniform` and dense models count.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from merged import Results, read_results
from rows import give

from prunetune.compare.table import SeedGroup, mean_difference

OURS, DENSE = "progressive", "dense"
OTHER_TEXT = {"legal": "ppl healthcare/text", "healthcare": "ppl legal/text"}
LEADS = {
    "legal": {0.6: 0.035, 0.4: 0.06, 0.3: 0.10},
    "healthcare": {0.6: 0.06, 0.4: 0.10, 0.3: 0.10},
}
GAPS = {"legal": 0.01, "healthcare": 0.08}
DOMAIN_RATIOS = {"legal": 1.0, "healthcare": 1.2}
GENERAL_RATIO = 1.75


def difference(group: SeedGroup, other: SeedGroup, metric: str) -> tuple[float, float]:
    """The group's mean minus the other's, and its standard error: the larger of that over items and that over seeds."""
    found = mean_difference(group, other, metric)
    errors = [found.get("difference_se"), found.get("difference_seed_se")]
    value = found.get("difference")
    return math.nan if value is None else value, max((error for error in errors if error is not None), default=math.nan)


def mean(group: SeedGroup, metric: str) -> float:
    """Mean over seeds; nan where no cell has the metric."""
    values = group.values(metric)
    return sum(values) / len(values) if values else math.nan


def best_two_stage(results: Results, keep: float, ours: SeedGroup) -> tuple[str, SeedGroup, str] | None:
    """The two-stage method of lowest nll, its cells, and what it is the best of: those that have most of our seeds."""
    is_two_stage = {cell["method"]: "two-stage" in cell["changes"] for cell in results.cells}
    groups = {name: results.group(name, keep) for name, is_one in is_two_stage.items() if is_one}
    scored = {name: group for name, group in groups.items() if group is not None}
    shared = {name: [seed for seed in ours.seeds if seed in group.seeds] for name, group in scored.items()}
    most = max(map(len, shared.values()), default=0)
    if not most:
        return None
    rivals = {name: scored[name].select_seeds(seeds) for name, seeds in shared.items() if len(seeds) == most}
    name = min(rivals, key=lambda name: mean(rivals[name], "nll"))
    fewer = [
        f"{name} {mean(group, 'nll'):.3f} with {len(group.seeds)}"
        for name, group in scored.items()
        if 0 < len(shared[name]) < most
    ]
    return (
        name,
        rivals[name],
        f"the best of {len(rivals)} two-stage methods" + (f" with as many seeds ({', '.join(fewer)})" if fewer else ""),
    )


def bars(domain: str, results: Results, keeps: Sequence[float] = ()) -> Iterator[dict[str, Any]]:
    """Every figure of a domain as {bar, case, value, target, met, unit}."""
    dense = results.group(DENSE, 1.0)
    found_keeps = {cell["keep"] for cell in results.cells if cell["method"] == OURS}
    for keep in sorted(found_keeps.intersection(keeps or found_keeps), reverse=True):
        ours = results.group(OURS, keep)
        assert ours is not None
        where = f"{domain}, {100 * (1 - keep):.0f}% removed, {len(ours.seeds)} seeds"
        if found := best_two_stage(results, keep, ours):
            name, best, field = found
            ours = ours.select_seeds(best.seeds)
            where = f"{domain}, {100 * (1 - keep):.0f}% removed, {len(ours.seeds)} seeds"
            lead, error = difference(best, ours, "nll")
            target = LEADS[domain].get(keep)
            yield {
                "bar": "M1",
                "case": f"{where}: nll below {name}, {field} ({mean(best, 'nll'):.3f} to "
                f"{mean(ours, 'nll'):.3f}; se {error:.3f})",
                "value": round(lead, 4),
                "target": f">= {target}" if target else "",
                "met": bool(target and lead >= target and lead > 2 * error),
                "unit": "nats",
            }
            if keep == 0.6:
                yield from forgetting_bars(domain, where, name, best, ours)
        if keep == 0.6 and dense is not None:
            yield from dense_bars(domain, where, dense.select_seeds(ours.seeds), ours)


def dense_bars(domain: str, where: str, dense: SeedGroup, ours: SeedGroup) -> Iterator[dict[str, Any]]:
    """M2 and M3: what is left to the dense model tuned by LoRA."""
    gap, error = difference(ours, dense, "nll")
    yield row("M2", f"{where}: nll above dense (se {error:.3f})", gap, "<=", GAPS[domain], "nats")
    for task in ours.cells[0]["scores"]:
        if ours.values(f"acc {task}") and task not in ours.cells[0].get("general", []):
            change, error = difference(ours, dense, f"acc {task}")
            case = f"{where}: accuracy of {task} above dense (limit: two paired standard errors below)"
            yield row("M2", case, change, ">=", -2 * error, "share")
    if ours.values("rouge_l"):
        ratio = mean(ours, "rouge_l") / mean(dense, "rouge_l")
        yield row("M2", f"{where}: ROUGE-L of dense's", ratio, ">=", 0.98, "ratio")
    for metric, most in ((f"ppl {domain}/text", DOMAIN_RATIOS[domain]), ("ppl general/text", GENERAL_RATIO)):
        case = f"{where}: {metric} of dense's ({mean(dense, metric):.2f} to {mean(ours, metric):.2f})"
        yield row("M3", case, mean(ours, metric) / mean(dense, metric), "<=", most, "ratio")


def forgetting_bars(domain: str, where: str, name: str, best: SeedGroup, ours: SeedGroup) -> Iterator[dict[str, Any]]:
    """M4: what nobody trained on, against the best two-stage method."""
    for task in ("arc_easy", "qasc"):
        change, error = difference(ours, best, f"acc {task}")
        case = f"{where}: zero-shot {task} above {name} (se {error:.3f})"
        yield row("M4", case, change, ">=", 0.0, "share")
    metric = OTHER_TEXT[domain]
    yield row("M4", f"{where}: {metric} of {name}'s", mean(ours, metric) / mean(best, metric), "<=", 0.92, "ratio")


def of_variant(results: Results, variant: str) -> Results:
    """The cells of methods named METHOD-variant, as METHOD, and of dense models; without a variant all."""
    ending = f"-{variant}" if variant else ""
    cells = [
        cell | {"method": cell["method"].removesuffix(ending)}
        for cell in results.cells
        if cell["method"].endswith(ending) or cell["keep"] == 1
    ]
    return replace(results, cells=cells)


def row(bar: str, case: str, value: float, sign: str, target: float, unit: str) -> dict[str, Any]:
    """One figure against its target."""
    met = value <= target if sign == "<=" else value >= target
    return {
        "bar": bar,
        "case": case,
        "value": round(value, 4),
        "target": f"{sign} {target:.4g}",
        "met": met,
        "unit": unit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="DOMAIN=FILE")
    parser.add_argument("--command", required=True, help="that made the cells")
    parser.add_argument("--case", default="", help="begins each case: the layout, the model")
    parser.add_argument("--variant", default="", help="ending of the methods' names")
    parser.add_argument("--keeps", nargs="+", type=float, default=[], help="budgets; default: all")
    parser.add_argument("--device", default="")
    parser.add_argument("--commit", default="")
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--out", type=Path, help="rows are appended to this file; default: printed")
    arguments = parser.parse_args()
    for entry in arguments.results:
        domain, _, file = entry.partition("=")
        results = of_variant(read_results([Path(file)]), arguments.variant)
        made = results.cells[0].get("made", {})
        origin = {
            "device": arguments.device or str(results.cells[0].get("device")),
            "command": arguments.command,
            "commit": arguments.commit or made.get("commit") or "",
            "final": arguments.final,
        }
        for figure in bars(domain, results, arguments.keeps):
            case = f"{arguments.case}, {figure['case']}" if arguments.case else figure["case"]
            give({**figure, "case": case, **origin}, arguments.out)


if __name__ == "__main__":
    main()
