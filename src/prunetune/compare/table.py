"""The table of a comparison: means and deviations over seeds, standard errors over items, paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunetune.compare.methods import DENSE, REFERENCE
from prunetune.config.recipe import RunConfig
from prunetune.evaluation.results import Item, TaskResult
from prunetune.evaluation.statistics import PER_ITEM_METRIC, aggregate_items, paired_difference
from prunetune.utils.json_lines import JsonObject, finite_or_none

# A column is a metric, which is a mean over the domain's tasks, or a metric and a task: "acc", "acc casehold".
SCORE_NAMES = {"acc": "accuracy", "nll": "nll", "rouge_l": "rouge_l", "ppl": "perplexity"}
FORMAT = "prunetune-comparison-1"
COST_KEYS = ("train_seconds", "teacher_seconds", "eval_seconds", "peak_mb")
# The values of a row whose cells all failed.
EMPTY_ROW: JsonObject = {
    "cell": None, "kept": None, "bytes": None, "scores": {}, "gap": None, "acc_of_dense": None, "help": None,
    **dict.fromkeys(COST_KEYS), "cost_seconds": None, "crowded": False,
}  # fmt: skip


@dataclass(frozen=True)
class SeedGroup:
    """The cells of one row: one method, budget and learning rate over its seeds."""

    cells: tuple[JsonObject, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in the order of the cells."""
        return tuple(cell["seed"] for cell in self.cells)

    def select_seeds(self, seeds: Sequence[int]) -> SeedGroup:
        """The cells of these seeds alone."""
        return SeedGroup(tuple(cell for cell in self.cells if cell["seed"] in seeds))

    def values(self, metric: str) -> list[float]:
        """The metric's value for each seed that has one."""
        name, _, task = metric.partition(" ")
        of_task = [cell["scores"].get(task, {}).get(SCORE_NAMES[name], [None])[0] for cell in self.cells]
        values = of_task if task else [cell["headline"].get(metric) for cell in self.cells]
        return [value for value in values if value is not None]

    def costs(self, key: str) -> list[float]:
        """One of `COST_KEYS` of each seed that has it."""
        return [cell[key] for cell in self.cells if cell.get(key) is not None]

    def task_results(self, metric: str) -> dict[str, TaskResult]:
        """The tasks that make up the metric; an item's score is its mean over seeds."""
        name, _, task = metric.partition(" ")
        scores, general = self.cells[0]["scores"], self.cells[0].get("general", [])
        tasks = [task] if task else [task for task in scores if task not in general]
        metric = SCORE_NAMES[name]
        return {task: self._task_result(task, metric) for task in tasks if metric in scores.get(task, {})}

    def _task_result(self, task: str, metric: str) -> TaskResult:
        items_by_seed = [item_scores(cell["items"].get(task, {})) for cell in self.cells]
        items: list[Item] = []
        for id in items_by_seed[0]:
            if all(id in by_id for by_id in items_by_seed):
                by_seed = [
                    by_id[id] for by_id in items_by_seed
                ]  # the scores that all seeds have; nan if one of them is
                shared = [name for name in by_seed[0] if all(name in scores for scores in by_seed)]
                means = {name: mean([scores[name] for scores in by_seed]) for name in shared}
                items.append(Item(id, "", "", "", None, means))
        scored = [item for item in items if PER_ITEM_METRIC.get(metric, metric) in item.scores]
        return TaskResult(task, {metric: aggregate_items(scored, metric)}, tuple(items))


def item_scores(columns: JsonObject) -> dict[str, dict[str, float]]:
    """{id: {metric: score}} from the columns in a cell's file; cells of 0.1.0 are laid out so, with None for nan."""
    if "id" not in columns:
        return {
            name: {metric: math.nan if value is None else value for metric, value in scores.items()}
            for name, scores in columns.items()
        }
    scores: dict[str, dict[str, float]] = {name: {} for name in columns["id"]}
    for metric, values in columns.items():
        if metric != "id":
            for name, value in zip(columns["id"], values, strict=True):
                if value is not None:
                    scores[name][metric] = float(value)
    return scores


def aggregate(cells: Sequence[JsonObject], learning_rates: Mapping[str, float], config: RunConfig) -> JsonObject:
    """The content of comparison.json: all rows, the trials of learning rates, and the errors of failed cells.

    `learning_rates` is each method's choice. Values that are not finite are None, as JSON has none.
    """
    keeps = sorted(set(config.compare.keeps or (config.budget.keep,)), reverse=True)
    trials = _learning_rate_trials(cells, learning_rates)
    cells = [stored for cell in cells for stored in (cell, *_as_stored(cell))]
    learning_rates = {
        method: rate
        for name, rate in learning_rates.items()
        for method in dict.fromkeys(cell["method"] for cell in cells if cell["method"].split("+")[0] == name)
    } | dict(learning_rates)
    kinds = {cell["method"]: method_kind(cell) for cell in cells}
    own = [name for name in learning_rates if kinds.get(name) == "progressive" and "+" not in name]
    # That others are compared with: `progressive`, or the first variant of it if that did not run.
    reference = REFERENCE if REFERENCE in own or not own else own[0]
    rows = [row for keep in keeps for row in _rows(cells, learning_rates, keep, reference)]
    # The days on which the cells ran, and the commits and versions that ran them; cells of 0.1.0 name the version.
    made = [{"version": cell.get("versions", {}).get("prunetune")} | cell.get("made", {}) for cell in cells]
    made_by = {f"{key}s": sorted({own[key] for own in made if own.get(key)}) for key in ("date", "commit", "version")}
    return {
        "format": FORMAT,
        "model": config.model,
        "split": config.compare.split,
        "reference": reference,
        "within": config.compare.within,
        "keeps": keeps,
        **_columns(cells, rows),
        "made": made_by,
        "rows": rows,
        "rates": trials,
        "errors": [{"cell": cell["cell"], "error": cell["error"]} for cell in cells if "error" in cell],
    }


def _columns(cells: Sequence[JsonObject], rows: Sequence[JsonObject]) -> JsonObject:
    """Names of scores by table: the domain's means and texts, what was known outside it, each task; and the floors."""
    scored = [cell for cell in cells if "error" not in cell]
    general = {task for cell in scored for task in cell.get("general", [])}
    named = dict.fromkeys(name for row in rows for name in row["scores"])
    means = dict.fromkeys(name for cell in scored for name in cell["headline"] if name in named)
    return {
        "metrics": [name for name in means if name.partition(" ")[2] not in general],
        "forgetting": [name for name in means if name.partition(" ")[2] in general],
        "tasks": [name for name in named if name not in means and not name.startswith("nll ")],
        "floors": {task: floors for cell in scored for task, floors in cell.get("floors", {}).items()},
    }


def _as_stored(cell: JsonObject) -> list[JsonObject]:
    """The cell once more for each format that its model was scored in, as a method of its own: "progressive+q4_k_m"."""
    return [
        {**cell, **scores, "method": f"{cell['method']}+{name}", "cell": f"{cell['cell']}+{name}", "formats": {}}
        for name, scores in cell.get("formats", {}).items()
    ]


def smallest_file(comparison: JsonObject) -> JsonObject | None:
    """The row of the smallest weights that are about as good as the dense tuned model; None without that."""
    return min(
        as_good_as_dense(comparison), key=lambda row: (row["bytes"], row["scores"]["nll"]["value"]), default=None
    )


def as_good_as_dense(comparison: JsonObject) -> list[JsonObject]:
    """The rows whose mean loss is at most `compare.within` above the dense tuned model's.

    Differences within one standard error of the items count as none.
    """
    dense = next((row for row in comparison["rows"] if row["method"] == DENSE and row["scores"].get("nll")), None)
    if dense is None:
        return []
    most, good = dense["scores"]["nll"]["value"] * (1 + comparison["within"]), []
    for row in comparison["rows"]:
        score = row["scores"].get("nll", {})
        if row.get("bytes") and score.get("value") is not None:
            error = score.get("dense_se") or 0.0
            good += [row] if score["value"] - error <= most else []
    return good


def _learning_rate_trials(cells: Sequence[JsonObject], learning_rates: Mapping[str, float]) -> list[JsonObject]:
    """The learning rates of every method that had several, each with its NLL on valid."""
    rows = []
    for method, chosen in learning_rates.items():
        of_method = [cell for cell in cells if cell["method"] == method]
        trials = [cell for cell in of_method if all(cell[key] == of_method[0][key] for key in ("keep", "seed"))]
        for cell in trials if len(trials) > 1 else ():
            rate, nll = cell["learning_rate"], cell.get("valid_nll")
            rows.append({"method": method, "learning_rate": rate, "valid_nll": nll, "chosen": rate == chosen})
    return rows


def _rows(
    cells: Sequence[JsonObject], learning_rates: Mapping[str, float], keep: float, reference_name: str
) -> list[JsonObject]:
    """A row for each method at one budget; dense methods are in the rows of every budget."""
    cells_by_method = {
        method: [
            cell
            for cell in cells
            if (cell["method"], cell["learning_rate"]) == (method, rate)
            and (cell["keep"] == keep or method_kind(cell) in ("dense", "untuned"))
        ]
        for method, rate in learning_rates.items()
    }
    groups = {
        method: SeedGroup(scored)
        for method, row_cells in cells_by_method.items()
        if (scored := tuple(sorted((c for c in row_cells if "error" not in c), key=lambda cell: cell["seed"])))
    }
    return [
        {
            "method": method,
            "kind": method_kind(row_cells[0]),
            "keep": keep,
            "learning_rate": learning_rates[method],
            "seeds": list(groups[method].seeds) if method in groups else [],
            "failed": sum("error" in cell for cell in row_cells),
            **(_row_scores(method, groups, reference_name) if method in groups else EMPTY_ROW),
        }
        for method, row_cells in cells_by_method.items()
        if row_cells
    ]


def method_kind(cell: JsonObject) -> str:
    """How the cell's model was trained: dense, untuned, two-stage or progressive."""
    return next((kind for kind in ("dense", "untuned", "two-stage") if kind in cell["changes"]), "progressive")


def _row_scores(method: str, groups: Mapping[str, SeedGroup], reference_name: str) -> JsonObject:
    group, dense, reference = groups[method], groups.get(DENSE), groups.get(reference_name)
    first, scores = group.cells[0], {}
    of_tasks = [
        f"{short} {task}"
        for task, of_task in first["scores"].items()
        for short, name in SCORE_NAMES.items()
        if name in of_task and task not in first.get("general", [])
    ]
    for metric in dict.fromkeys([*first["headline"], *of_tasks]):
        if values := group.values(metric):
            tasks = [score for result in group.task_results(metric).values() for score in result.scores.values()]
            scores[metric] = {
                "value": finite_or_none(mean(values)),
                "sd": finite_or_none(float(np.std(values, ddof=1))) if len(values) > 1 else None,
                # Of the mean over tasks, all with equal weight.
                "se": finite_or_none(math.hypot(*(score.se for score in tasks)) / len(tasks)) if tasks else None,
                **(mean_difference(group, reference, metric) if reference and method != reference_name else {}),
            }
            if metric == "nll" and dense and method != DENSE:
                scores[metric]["dense_se"] = mean_difference(group, dense, metric).get("difference_se")
    pair = _pair_by_seed(group, dense)  # dense tuned, over common seeds
    nll, accuracy = ([mean(own.values(name)) for own in pair or (SeedGroup(()),) * 2] for name in ("nll", "acc"))
    return {
        "cell": first["cell"],
        "kept": mean([cell["kept"] for cell in group.cells]),
        "bytes": finite_or_none(mean([cell["bytes"] for cell in group.cells if "bytes" in cell])),
        "scores": scores,
        "gap": finite_or_none(nll[0] - nll[1]),
        "acc_of_dense": finite_or_none(accuracy[0] / accuracy[1]) if accuracy[1] else None,
        "help": first.get("help"),
        **{key: finite_or_none(mean(group.costs(key))) for key in COST_KEYS},
        "cost_seconds": sum(mean(group.costs(key)) for key in ("train_seconds", "teacher_seconds")),
        "crowded": any(cell["crowded"] for cell in group.cells),
    }


def _pair_by_seed(group: SeedGroup, other: SeedGroup | None) -> tuple[SeedGroup, SeedGroup] | None:
    """Both groups on the seeds that they have in common, None without one; untuned models do not depend on a seed."""
    if other is None:
        return None
    if "untuned" in (method_kind(group.cells[0]), method_kind(other.cells[0])):
        return group, other
    common = [seed for seed in group.seeds if seed in other.seeds]
    return (group.select_seeds(common), other.select_seeds(common)) if common else None


def mean_difference(group: SeedGroup, other: SeedGroup | None, metric: str) -> dict[str, float | None]:
    """The group's mean minus the other's over common seeds, {} without one: the paired difference of every table.

    `difference_se` is over items: each item's scores are averaged over the seeds and paired, the tasks' errors combine
    as independent. `difference_seed_se` is over seeds: the deviation of the seeds' differences over the root of their
    number, None for one seed.
    """
    pair = _pair_by_seed(group, other)
    if pair is None or not (pair[0].values(metric) and pair[1].values(metric)):
        return {}
    ours, theirs = pair
    our_tasks, their_tasks = ours.task_results(metric), theirs.task_results(metric)
    by_task = [
        paired_difference(our_tasks[task], their_tasks[task], SCORE_NAMES[metric.partition(" ")[0]])
        for task in our_tasks
        if task in their_tasks
    ]
    error = math.hypot(*(difference.se for difference in by_task)) / len(by_task) if by_task else math.nan
    by_seed = [left - right for left, right in zip(ours.values(metric), theirs.values(metric), strict=False)]
    is_paired = len(by_seed) == len(ours.cells) == len(theirs.cells) > 1
    seed_error = float(np.std(by_seed, ddof=1)) / math.sqrt(len(by_seed)) if is_paired else math.nan
    return {
        "difference": finite_or_none(mean(ours.values(metric)) - mean(theirs.values(metric))),
        "difference_se": finite_or_none(error),
        "difference_seed_se": finite_or_none(seed_error),
    }


def mean(values: Sequence[float]) -> float:
    """The mean; nan of no values."""
    return math.fsum(values) / len(values) if values else math.nan
