"""Results round-trip through JSON, and their statistics agree with textbook formulas."""

from __future__ import annotations

import json
import math
import random
import statistics as textbook
from dataclasses import replace

import pytest

from prunetune.errors import DataError
from prunetune.evaluation.results import (
    MAX_PROMPT_CHARS,
    Evaluation,
    Item,
    Score,
    TaskResult,
    headline_metric,
    higher_is_better,
    recovery,
)
from prunetune.evaluation.statistics import aggregate_items, mean_score, paired_difference


def item(name: str, expected: str = "a", got: str = "a", **scores: float) -> Item:
    return Item(name, "prompt", expected, got, expected == got, scores)


def chosen(count: int, *, wrong: int, labels: str = "ab") -> list[Item]:
    """`count` items, the first `wrong` of them answered with the next label."""
    items = []
    for index in range(count):
        expected = labels[index % len(labels)]
        answer = labels[(index + 1) % len(labels)] if index < wrong else expected
        items.append(item(f"i{index}", expected, answer, accuracy=float(expected == answer)))
    return items


def result(items: list[Item], *metrics: str) -> TaskResult:
    return TaskResult("task", {metric: aggregate_items(items, metric) for metric in metrics}, tuple(items))


def test_json_round_trips() -> None:
    task = result(chosen(6, wrong=2), "accuracy", "macro_f1")
    evaluation = Evaluation({"task": task, "other": TaskResult("other", {}, ())})
    text = evaluation.to_json()
    assert Evaluation.from_json(text) == evaluation
    assert Evaluation.from_json(text).to_json() == text


def test_json_is_valid_without_numbers() -> None:
    broken = Item("i", "p", "e", "", None, {"accuracy": math.nan, "nll": math.inf})
    evaluation = Evaluation({"t": TaskResult("t", {"accuracy": Score(math.nan, math.nan, 1)}, (broken,))})
    text = evaluation.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = Evaluation.from_json(text).tasks["t"]
    assert math.isnan(back.scores["accuracy"].value)
    assert math.isnan(back.items[0].scores["nll"])
    assert back.items[0].correct is None


def test_json_keeps_the_beginning_of_long_prompts() -> None:
    long = Item("i", "x" * 5000, "e" * 5000, "g", False, {})
    back = Evaluation.from_json(Evaluation({"t": TaskResult("t", {}, (long,))}).to_json()).tasks["t"].items[0]
    assert back.prompt == "x" * 2000
    assert back.expected == long.expected


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "other"}', '{"format": "prunetune-evaluation-1", "tasks": 3}']
)
def test_other_json_is_a_one_line_error(text: str) -> None:
    with pytest.raises(DataError) as refused:
        Evaluation.from_json(text)
    assert "\n" not in str(refused.value)


def test_mean_has_the_textbook_error() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    score = mean_score(values)
    assert score.value == textbook.fmean(values)
    assert score.se == pytest.approx(textbook.stdev(values) / 2)
    assert math.isnan(mean_score([1.0]).se)
    assert mean_score([]).n == 0


def test_macro_f1_weighs_labels_alike() -> None:
    items = [*(item(f"a{n}", "a", "a", accuracy=1.0) for n in range(8)), item("b", "b", "a", accuracy=0.0)]
    assert aggregate_items(items, "macro_f1").value == pytest.approx((16 / 17 + 0) / 2)
    assert aggregate_items(chosen(10, wrong=0), "macro_f1").value == 1.0


def test_macro_f1_with_a_nan_item_is_nan() -> None:
    assert math.isnan(aggregate_items([*chosen(4, wrong=1), item("n", got="", accuracy=math.nan)], "macro_f1").value)


def test_macro_f1_error_is_near_accuracy_error_on_balanced_labels() -> None:
    items = chosen(200, wrong=60)
    assert aggregate_items(items, "macro_f1").se == pytest.approx(aggregate_items(items, "accuracy").se, rel=0.15)


def test_perplexity_weighs_tokens_alike() -> None:
    items = [item("a", nll=1.0, tokens=30.0), item("b", nll=2.0, tokens=10.0)]
    assert aggregate_items(items, "perplexity").value == pytest.approx(math.exp(50 / 40))
    assert math.isnan(aggregate_items(items[:1], "perplexity").se)


def test_bootstrap_repeats_and_shrinks_with_more_documents() -> None:
    rng = random.Random(0)
    items = [item(str(n), nll=rng.gauss(2, 0.5), tokens=20.0) for n in range(400)]
    assert aggregate_items(items, "perplexity") == aggregate_items(items, "perplexity")
    few, many = aggregate_items(items[:100], "perplexity"), aggregate_items(items, "perplexity")
    assert many.se == pytest.approx(few.se / 2, rel=0.3)
    # By the delta method the error of exp(mean) is exp(mean) times the error of the mean.
    assert many.se == pytest.approx(
        many.value * mean_score([document.scores["nll"] for document in items]).se, rel=0.15
    )


def test_huge_losses_do_not_raise() -> None:
    items = [item(str(n), nll=1e4, tokens=3.0) for n in range(3)]
    assert aggregate_items(items, "perplexity").value == math.inf


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "nll", "perplexity"])
def test_result_equals_itself_in_a_comparison(metric: str) -> None:
    items = [
        Item(base.id, "", base.expected, base.got, base.correct, base.scores | {"nll": n / 7, "tokens": 3.0 + n})
        for n, base in enumerate(chosen(9, wrong=3))
    ]
    same = result(items, "accuracy", "macro_f1", "nll", "perplexity")
    difference = paired_difference(same, same, metric)
    assert (difference.value, difference.se, difference.n) == (0.0, 0.0, 9)


def test_pairing_removes_shared_variance() -> None:
    rng = random.Random(0)
    base = [rng.gauss(0, 1) for _ in range(50)]
    a = result([item(str(n), nll=value + 0.5) for n, value in enumerate(base)], "nll")
    b = result([item(str(n), nll=value) for n, value in reversed(list(enumerate(base)))], "nll")
    difference = paired_difference(a, b, "nll")
    assert difference.value == pytest.approx(0.5)
    assert difference.se == pytest.approx(0, abs=1e-9)
    assert a.scores["nll"].se > 0.1


def test_only_common_items_are_paired() -> None:
    a, b = result(chosen(6, wrong=2), "accuracy"), result(chosen(4, wrong=0), "accuracy")
    assert paired_difference(a, b, "accuracy").n == 4
    assert paired_difference(a, b, "accuracy").value == -0.5
    with pytest.raises(DataError, match="no item has rouge_l"):
        paired_difference(a, b, "rouge_l")


def test_items_of_one_id_with_other_questions_are_not_paired() -> None:
    """Rows without an id are numbered by line, and lines move."""
    items = [replace(item, prompt=f"{n} " + "x" * MAX_PROMPT_CHARS) for n, item in enumerate(chosen(8, wrong=2))]
    a = result(items, "accuracy")
    for change in ({"prompt": "other"}, {"expected": "other"}):
        b = result([replace(item, **change) if n < 4 else item for n, item in enumerate(items)], "accuracy")
        assert paired_difference(a, b, "accuracy").n == 4
        c = result([replace(item, **change) if n < 5 else item for n, item in enumerate(items)], "accuracy")
        with pytest.raises(DataError, match="of 8 items with the same id in both results only 3 ask the same") as moved:
            paired_difference(a, c, "accuracy")
        assert "\n" not in str(moved.value)


def test_pairs_compare_only_the_kept_beginning_of_a_prompt() -> None:
    long = [replace(item, prompt=f"{n} " + "x" * 2 * MAX_PROMPT_CHARS) for n, item in enumerate(chosen(4, wrong=1))]
    a = result(long, "accuracy")
    kept = Evaluation.from_json(Evaluation({"task": a}).to_json()).tasks["task"]
    bare = result([replace(item, prompt="", expected="") for item in long], "accuracy")
    for other in (kept, bare):
        assert paired_difference(a, other, "accuracy").n == paired_difference(other, a, "accuracy").n == 4


def test_headline_metric_has_its_direction() -> None:
    some = Score(0.5, 0.1, 4)
    assert headline_metric(TaskResult("t", {"nll": some, "accuracy": some}, ())) == "accuracy"
    assert headline_metric(TaskResult("t", {"nll": some, "rouge_l": some}, ())) == "rouge_l"
    assert headline_metric(TaskResult("t", {"nll": some}, ())) == "nll"
    assert headline_metric(TaskResult("t", {}, ())) == ""
    assert all(map(higher_is_better, ("accuracy", "macro_f1", "rouge_l", "exact_match")))
    assert not any(map(higher_is_better, ("perplexity", "nll")))


def test_recovery_is_one_without_loss_and_less_with_one() -> None:
    dense, worse = Score(0.8, 0, 1), Score(0.6, 0, 1)
    assert recovery(dense, dense, "nll") == recovery(dense, dense, "accuracy") == 1
    assert recovery(worse, dense, "accuracy") == pytest.approx(0.75)
    assert recovery(dense, worse, "perplexity") == pytest.approx(0.75)
    assert math.isnan(recovery(worse, Score(0.0, 0, 1), "accuracy"))


def test_means_weigh_tasks_alike_and_skip_those_without() -> None:
    tasks = {
        "a": TaskResult("a", {"accuracy": Score(0.2, 0.3, 10), "nll": Score(1.0, 0.0, 10)}, ()),
        "b": TaskResult("b", {"accuracy": Score(0.6, 0.4, 1000)}, ()),
    }
    evaluation = Evaluation(tasks)
    assert evaluation.mean_accuracy() == pytest.approx(0.4)
    assert evaluation.mean("accuracy").se == pytest.approx(0.25)
    assert evaluation.mean_nll() == 1.0
    assert math.isnan(evaluation.mean("rouge_l").value)
