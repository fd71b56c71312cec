"""What a cell's file keeps of each item: enough for paired differences, in few characters."""

from __future__ import annotations

import json
import math

import pytest

from prunetune.compare.scoring import headline, item_columns, scores_from_evaluation
from prunetune.compare.table import SeedGroup
from prunetune.evaluation.results import Evaluation
from support.comparison import cell, item, task


def test_items_are_columns_of_short_numbers() -> None:
    items = [
        item("a", accuracy=1.0, nll=1.23456789, tokens=3.0, bytes=9.0),
        item("b", accuracy=0.0, nll=math.nan, tokens=2.0, bytes=8.0, rouge_l=0.5),
    ]
    columns = item_columns(items)
    assert columns == {
        "id": ["a", "b"], "accuracy": [1, 0], "nll": [1.23457, "nan"], "rouge_l": [None, 0.5], "tokens": [3, 2],
    }  # fmt: skip
    json.dumps(columns, allow_nan=False)


def test_scores_of_a_task_are_those_of_its_columns() -> None:
    items = [item(f"i{n}", accuracy=float(n % 3 == 0), nll=1 + n / 7, tokens=2.0) for n in range(30)]
    texts = [item(f"t{n}", nll=2 + n / 9, tokens=40.0 + n) for n in range(9)]
    group = SeedGroup((cell("random", task("a", items, "accuracy", "nll"), task("t", texts, "perplexity")),))
    for metric in ("acc", "nll", "acc a", "nll a", "ppl t"):
        (result,) = group.task_results(metric).values()
        (score,) = result.scores.values()
        assert score.value == pytest.approx(group.values(metric)[0], abs=1e-4)


def test_cell_of_all_test_rows_is_small() -> None:
    """60 such cells are 4 MB: five tasks of 200 answers, five of 200 texts or questions."""
    tasks = {
        f"task-{n}": task(
            f"task-{n}", [item(f"task-{n}-{i:05}", accuracy=1.0, nll=i / 7, tokens=12.0) for i in range(200)], "nll"
        )
        for n in range(10)
    }
    scores = scores_from_evaluation(Evaluation(tasks))
    assert len(json.dumps(scores)) < 100_000


def test_headline_has_means_of_the_domain_and_each_general_task() -> None:
    def answers(nll: float) -> list:
        return [item(f"i{n}", accuracy=nll % 2, nll=nll, tokens=1.0) for n in range(3)]

    evaluation = Evaluation({
        "a": task("a", answers(1.0), "accuracy", "nll"),
        "b": task("b", answers(2.0), "accuracy", "nll"),
        "school": task("school", answers(5.0), "accuracy", "nll", general=True),
        "law": task("law", [item("t", nll=0.0, tokens=4.0)], "perplexity", general=True),
    })  # fmt: skip
    assert headline(evaluation) == {"acc": 0.5, "nll": 1.5, "rouge_l": None, "acc school": 1.0, "ppl law": 1.0}
