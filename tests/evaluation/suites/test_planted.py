"""Models of which one knows the truth get the right verdict of a check: worse, equal but for noise, or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prunetune.evaluation.results import Evaluation, Item, TaskResult
from prunetune.evaluation.statistics import aggregate_items
from prunetune.evaluation.suites import parse_suite
from prunetune.evaluation.suites.check import CheckResult, check_limits

TASKS, ROWS, NULL_COMPARISONS = ("triage", "codes", "letters"), 200, 200
SUITE = parse_suite({"tasks": {name: {"data": "x.jsonl", "scorer": "accuracy"} for name in TASKS}})


def model(seed: int, *, flips: float = 0.0, loses: float = 0.0, rows: int = ROWS, count: int = 3) -> Evaluation:
    """Right in 70% of the rows of each task; of the rows, `flips` change by chance, and `loses` of all get wrong."""
    tasks, truth, rng = {}, np.random.default_rng(7), np.random.default_rng(seed)
    for name in TASKS[:count]:
        right = truth.random(rows) < 0.7
        right = np.where(rng.random(rows) < flips, rng.random(rows) < 0.7, right)
        lost = rng.permutation(np.flatnonzero(right))[: round(loses * rows)]
        right[lost] = False
        items = tuple(
            Item(f"{name} {n}", f"question {n} of {name}", "a", "a" if r else "b", bool(r), {"accuracy": float(r)})
            for n, r in enumerate(right)
        )
        tasks[name] = TaskResult(name, {"accuracy": aggregate_items(items, "accuracy")}, items)
    return Evaluation(tasks)


def broken_tasks(result: CheckResult) -> set[str]:
    return {verdict.limit.task for verdict in result.broken}


def test_model_that_is_worse_by_five_points_is_found_in_every_task() -> None:
    result = check_limits(model(1, flips=0.02, loses=0.05), model(2), SUITE)
    assert broken_tasks(result) == set(TASKS)
    assert result.exit_code == 1


def test_of_200_comparisons_of_equal_models_at_most_16_alarm() -> None:
    pairs = (
        [model(seed, flips=0.3, rows=40, count=1) for seed in (2 * index, 2 * index + 1)]
        for index in range(NULL_COMPARISONS)
    )
    assert sum(bool(check_limits(mine, theirs, SUITE).broken) for mine, theirs in pairs) <= 16


def test_tasks_whose_names_were_swapped_are_not_compared() -> None:
    mine, theirs = model(1), model(2)
    swapped = {**theirs.tasks, "triage": theirs.tasks["codes"], "codes": theirs.tasks["triage"]}
    renamed = Evaluation({name: replace(result, task=name) for name, result in swapped.items()})
    result = check_limits(mine, renamed, SUITE)
    assert set(result.errors) == {"triage", "codes"}
    assert result.exit_code == 2
    assert [verdict.limit.task for verdict in result.verdicts] == ["letters"]


@pytest.mark.parametrize("missing", [0, 30])
def test_reference_of_other_rows_is_refused_and_one_that_lacks_some_is_not(missing: int) -> None:
    mine, theirs = model(1), model(2)
    items = theirs.tasks["triage"].items
    other = items[missing:] if missing else tuple(replace(item, prompt=f"other {item.prompt}") for item in items)
    changed = Evaluation({**theirs.tasks, "triage": replace(theirs.tasks["triage"], items=other)})
    assert check_limits(mine, changed, SUITE).exit_code == (0 if missing else 2)
