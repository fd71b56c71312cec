"""From cells to one table: means and deviations over seeds, errors over items, differences over paired items."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunetune.compare.methods import DENSE, REFERENCE
from prunetune.compare.scoring import finite_or_none
from prunetune.config.recipe import RunConfig
from prunetune.evaluation.results import Item, Score, TaskResult
from prunetune.evaluation.statistics import aggregate_items, paired_difference

TableCell = Mapping[str, Any]  # a cell's file
ITEM_METRICS = {"acc": "accuracy", "nll": "nll", "rouge_l": "rouge_l"}
PERPLEXITY_PREFIX = "ppl "  # begins the name of a text's column
FORMAT = "prunetune-comparison-1"
COST_KEYS = ("train_seconds", "teacher_seconds", "eval_seconds", "peak_mb")
# A row of which every cell failed.
EMPTY_ROW: Mapping[str, Any] = {
    "kept": None, "scores": {}, "gap": None, "acc_of_dense": None, **dict.fromkeys(COST_KEYS), "crowded": False,
}  # fmt: skip


@dataclass(frozen=True)
class SeedGroup:
    """The cells of one row: one method, budget and learning rate over its seeds."""

    cells: tuple[TableCell, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """In the order they came."""
        return tuple(cell["seed"] for cell in self.cells)

    def select_seeds(self, seeds: Sequence[int]) -> SeedGroup:
        """The same with these seeds alone."""
        return SeedGroup(tuple(cell for cell in self.cells if cell["seed"] in seeds))

    def values(self, metric: str) -> list[float]:
        """The metric of each seed that has it."""
        found = [cell["headline"].get(metric) for cell in self.cells]
        return [value for value in found if value is not None]

    def task_results(self, metric: str) -> dict[str, TaskResult]:
        """The tasks that have the metric, each item's scores a mean over seeds."""
        inner = "perplexity" if metric.startswith(PERPLEXITY_PREFIX) else ITEM_METRICS[metric]
        first = self.cells[0]["scores"]
        names = [metric.removeprefix(PERPLEXITY_PREFIX)] if metric.startswith(PERPLEXITY_PREFIX) else list(first)
        return {task: self._task_result(task, inner) for task in names if inner in first.get(task, {})}

    def _task_result(self, task: str, metric: str) -> TaskResult:
        each = [cell["items"].get(task, {}) for cell in self.cells]
        common = [name for name in each[0] if all(name in items for items in each)]
        items = tuple(Item(name, "", "", "", None, _mean_scores([found[name] for found in each])) for name in common)
        own = "nll" if metric == "perplexity" else metric
        scored = [item for item in items if own in item.scores]
        return TaskResult(task, {metric: aggregate_items(scored, metric)}, items)


def _mean_scores(scores: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of every score that all of them have; nan where one is not finite."""
    names = [name for name in scores[0] if all(name in other for other in scores)]
    return {name: math.fsum(_number(other[name]) for other in scores) / len(scores) for name in names}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def aggregate(cells: Sequence[TableCell], learning_rates: Mapping[str, float], config: RunConfig) -> dict[str, Any]:
    """All rows, the trials of learning rates, and what failed, from cells and each method's learning rate.

    Plain values; what is not finite is None.
    """
    keeps = sorted(set(config.compare.keeps or (config.budget.keep,)), reverse=True)
    reference = pick_reference(cells, learning_rates)
    rows = [row for keep in keeps for row in _rows(cells, learning_rates, keep, reference)]
    return {
        "format": FORMAT,
        "model": config.model,
        "split": config.compare.split,
        "reference": reference,
        "keeps": keeps,
        "metrics": list(dict.fromkeys(name for row in rows for name in row["scores"])),
        "rows": rows,
        "rates": _learning_rate_trials(cells, learning_rates),
        "errors": [{"cell": cell["cell"], "error": cell["error"]} for cell in cells if "error" in cell],
    }


def pick_reference(cells: Sequence[TableCell], chosen: Mapping[str, float]) -> str:
    """What the others are held against: the recipe's one stage, or the first variant of it where that is not there."""
    kinds = {cell["method"]: method_kind(cell) for cell in cells}
    own = [name for name in chosen if kinds.get(name) == "one-stage"]
    return REFERENCE if REFERENCE in own or not own else own[0]


def _learning_rate_trials(cells: Sequence[TableCell], chosen: Mapping[str, float]) -> list[dict[str, Any]]:
    """Where a method had several learning rates: each with its NLL on valid."""
    found = []
    for method in chosen:
        own = [cell for cell in cells if cell["method"] == method]
        first = [cell for cell in own if (cell["keep"], cell["seed"]) == (own[0]["keep"], own[0]["seed"])]
        if len(first) > 1:
            found += [
                {
                    "method": method,
                    "learning_rate": cell["learning_rate"],
                    "valid_nll": cell.get("valid_nll"),
                    "chosen": cell["learning_rate"] == chosen[method],
                }
                for cell in first
            ]
    return found


def _rows(
    cells: Sequence[TableCell], chosen: Mapping[str, float], keep: float, reference_name: str
) -> list[dict[str, Any]]:
    """A row for each method at one budget; what is dense stands beside every budget."""
    groups, failed, kinds = {}, {}, {}
    for name in chosen:
        own = [cell for cell in cells if cell["method"] == name and cell["learning_rate"] == chosen[name]]
        at = [cell for cell in own if cell["keep"] == keep or method_kind(cell) in ("dense", "untuned")]
        groups[name] = SeedGroup(tuple(cell for cell in at if "error" not in cell))
        failed[name] = sum("error" in cell for cell in at)
        kinds[name] = method_kind(at[0]) if at else ""
    whole = {name: group for name, group in groups.items() if group.cells}
    return [
        {
            "method": name,
            "kind": kinds[name],
            "keep": keep,
            "learning_rate": chosen[name],
            "seeds": list(groups[name].seeds),
            "failed": failed[name],
            **(_row_scores(name, whole, reference_name) if name in whole else {**EMPTY_ROW}),
        }
        for name in chosen
        if name in whole or failed[name]
    ]


def method_kind(cell: TableCell) -> str:
    """How the cell's model came about."""
    return next((kind for kind in ("dense", "untuned", "two-stage") if kind in cell["changes"]), "one-stage")


def _row_scores(name: str, groups: Mapping[str, SeedGroup], reference_name: str) -> dict[str, Any]:
    group, dense, reference = groups[name], groups.get(DENSE), groups.get(reference_name)
    scores = {}
    for metric in group.cells[0]["headline"]:
        values = group.values(metric)
        if values:
            scores[metric] = {
                "value": finite_or_none(mean(values)),
                "sd": finite_or_none(standard_deviation(values)),
                "se": finite_or_none(standard_error(group.task_results(metric).values())),
                **(mean_difference(group, reference, metric) if reference and name != reference_name else {}),
            }
    return {
        "kept": mean([cell["kept"] for cell in group.cells]),
        "scores": scores,
        "gap": _relative_to_dense(group, dense, "nll", ratio=False),
        "acc_of_dense": _relative_to_dense(group, dense, "acc", ratio=True),
        **{key: _mean_of(group, key) for key in COST_KEYS},
        "crowded": any(cell["crowded"] for cell in group.cells),
    }


def _relative_to_dense(group: SeedGroup, dense: SeedGroup | None, metric: str, *, ratio: bool) -> float | None:
    """Difference to the dense tuned model over common seeds, or ratio."""
    pair = _pair_by_seed(group, dense)
    if pair is None:
        return None
    ours, theirs = (mean(one.values(metric)) for one in pair)
    if ratio:
        return finite_or_none(ours / theirs) if theirs else None
    return finite_or_none(ours - theirs)


def _pair_by_seed(group: SeedGroup, other: SeedGroup | None) -> tuple[SeedGroup, SeedGroup] | None:
    """Both over the seeds that they have in common; what has no seed of its own (untuned) goes with all."""
    if other is None:
        return None
    if any(method_kind(one.cells[0]) == "untuned" for one in (group, other)):
        return group, other
    common = [seed for seed in group.seeds if seed in other.seeds]
    return (group.select_seeds(common), other.select_seeds(common)) if common else None


def mean_difference(group: SeedGroup, other: SeedGroup | None, metric: str) -> dict[str, float | None]:
    """This minus the other over common seeds, with the standard error over paired items."""
    pair = _pair_by_seed(group, other)
    if pair is None or not (pair[0].values(metric) and pair[1].values(metric)):
        return {}
    ours, theirs = pair
    left, right = ours.task_results(metric), theirs.task_results(metric)
    inner = "perplexity" if metric.startswith(PERPLEXITY_PREFIX) else ITEM_METRICS[metric]
    found = [paired_difference(left[task], right[task], inner) for task in left if task in right]
    spread = math.hypot(*(one.se for one in found)) / len(found) if found else math.nan
    return {
        "difference": finite_or_none(mean(ours.values(metric)) - mean(theirs.values(metric))),
        "difference_se": finite_or_none(spread),
    }


def standard_error(tasks: Iterable[TaskResult]) -> float:
    """Standard error of the mean over tasks, each weighing the same."""
    scores: list[Score] = [score for task in tasks for score in task.scores.values()]
    return math.hypot(*(score.se for score in scores)) / len(scores) if scores else math.nan


def mean(values: Sequence[float]) -> float:
    """nan over nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def standard_deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample; nan below two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def _mean_of(group: SeedGroup, key: str) -> float | None:
    values = [cell[key] for cell in group.cells if cell.get(key) is not None]
    return mean(values) if values else None
