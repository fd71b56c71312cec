"""Paired tests hold their level, find real losses, and agree with tests computed in another way."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from prunetune.errors import DataError
from prunetune.evaluation import paired
from prunetune.evaluation.paired import compare_paired, holm, mcnemar
from prunetune.evaluation.results import Item, TaskResult
from prunetune.evaluation.statistics import aggregate_items

LEVEL = 0.05
Scores = np.ndarray


def task(values: Scores, metric: str, name: str = "t") -> TaskResult:
    """Items with these scores and two labels; the answer is the right label where the score is 1."""
    items = tuple(
        Item(
            str(index), "", "ab"[index % 2], "ab"[(index + (value < 1)) % 2], bool(value == 1),
            {"accuracy": float(value), "rouge_l": float(value), "nll": float(value), "tokens": 1.0 + index % 7},
        )
        for index, value in enumerate(values)
    )  # fmt: skip
    return TaskResult(name, {metric: aggregate_items(items, metric)}, items)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 5), (3, 9), (9, 3), (40, 60), (700, 800), (1500, 1501)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    theirs = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(theirs, rel=1e-8)


def test_randomisation_agrees_with_every_swap() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(9), rng.random(9)
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples").pvalue
    assert compare_paired(task(a, "rouge_l"), task(b, "rouge_l"), "rouge_l").p_value == pytest.approx(theirs, abs=0.02)


def test_interval_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(4)
    a = rng.random(300)
    b = np.clip(a + rng.normal(0.05, 0.1, 300), 0.01, 0.99)
    comparison = compare_paired(task(b, "rouge_l"), task(a, "rouge_l"), "rouge_l")
    gains = b - a
    half = 1.96 * gains.std(ddof=1) / math.sqrt(300)
    assert comparison.difference == pytest.approx(gains.mean())
    assert (comparison.ci_low, comparison.ci_high) == pytest.approx(
        (gains.mean() - half, gains.mean() + half), abs=0.003
    )


Kind = Callable[[np.random.Generator], Scores]
KINDS: dict[str, Kind] = {
    "accuracy": lambda rng: (rng.random(120) < 0.6).astype(float),
    "macro_f1": lambda rng: (rng.random(120) < 0.6).astype(float),
    "rouge_l": lambda rng: rng.beta(0.5, 1.5, 40),
    "perplexity": lambda rng: rng.gamma(2.0, 1.0, 12),
}


@pytest.mark.parametrize("metric", KINDS)
def test_paired_test_of_equal_models_rarely_alarms(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 comparisons of a model's items with a resample of them; an alarm is a loss with p within the level."""
    monkeypatch.setattr("prunetune.evaluation.paired.RESAMPLES", 799)
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(200):
        scores = KINDS[metric](rng)
        first, second = (task(rng.choice(scores, len(scores)), metric) for _ in range(2))
        comparison = compare_paired(first, second, metric)
        worse = comparison.difference > 0 if metric == "perplexity" else comparison.difference < 0
        alarms += worse and comparison.p_value <= LEVEL
    assert alarms <= LEVEL * 200


@pytest.mark.parametrize("metric", KINDS)
def test_paired_test_finds_a_real_loss(metric: str) -> None:
    rng = np.random.default_rng(8)
    scores = KINDS[metric](rng)
    if metric == "perplexity":
        worse = scores + 0.5
    elif metric == "rouge_l":
        worse = scores * 0.7
    else:
        worse = np.where(rng.random(len(scores)) < 0.3, 0.0, scores)
    comparison = compare_paired(task(worse, metric), task(scores, metric), metric)
    assert comparison.p_value < 0.001
    assert (comparison.ci_low > 0) if metric == "perplexity" else (comparison.ci_high < 0)


@pytest.mark.parametrize("metric", KINDS)
def test_paired_test_of_identical_scores_has_p_one(metric: str) -> None:
    same = task(KINDS[metric](np.random.default_rng(9)), metric)
    comparison = compare_paired(same, same, metric)
    assert (comparison.difference, comparison.p_value) == (0.0, 1.0)
    assert compare_paired(same, same, metric) == comparison


def test_nan_scores_give_nan_and_unpaired_items_are_refused() -> None:
    known, unknown = task(np.array([0.1, 0.2, 0.3]), "rouge_l"), task(np.array([0.1, math.nan, 0.3]), "rouge_l")
    assert math.isnan(compare_paired(unknown, known, "rouge_l").p_value)
    assert math.isnan(compare_paired(known, unknown, "rouge_l").difference)
    with pytest.raises(DataError, match="no item has accuracy in both"):
        compare_paired(known, known, "accuracy")
    single = task(np.array([0.5]), "rouge_l")
    assert math.isnan(compare_paired(single, single, "rouge_l").ci_low)


def test_holm_keeps_the_order_and_never_lowers() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    mixed = holm([math.nan, 0.02])
    assert math.isnan(mixed[0])
    assert mixed[1] == 0.02
    rng = np.random.default_rng(0)
    for values in rng.random((50, 6)):
        adjusted = holm(list(values))
        assert all(after >= before for before, after in zip(values, adjusted, strict=True))
        assert [adjusted[index] for index in np.argsort(values)] == sorted(adjusted)


def test_p_value_of_a_randomisation_is_never_zero() -> None:
    """The split that was seen is one of those that could have been: the least value is one of all resamples."""
    rng = np.random.default_rng(5)
    better = rng.random(40) * 0.1
    comparison = compare_paired(task(better + 0.8, "rouge_l"), task(better, "rouge_l"), "rouge_l")
    assert comparison.p_value == pytest.approx(1 / 10_000)


def test_answers_right_or_wrong_are_tested_by_mcnemar_and_graded_ones_by_randomisation() -> None:
    first, second = np.repeat([0.0, 1.0, 1.0], [9, 2, 20]), np.repeat([1.0, 0.0, 1.0], [9, 2, 20])
    counted = compare_paired(task(first, "accuracy"), task(second, "accuracy"), "accuracy")
    assert (counted.test, counted.p_value) == ("McNemar", mcnemar(9, 2))
    graded = compare_paired(task(first * 0.5, "rouge_l"), task(second, "rouge_l"), "rouge_l")
    assert graded.test == "randomisation"


@pytest.mark.parametrize("chunk", [1, 2 * 9998, 2**22])
def test_one_graded_item_is_no_evidence_however_many_resamples_fit_into_memory(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its two orders is as far from none as the one that was seen, so that p is one."""
    monkeypatch.setattr(paired, "CHUNK", chunk)
    better, worse = task(np.array([0.7]), "rouge_l"), task(np.array([0.4]), "rouge_l")
    assert compare_paired(better, worse, "rouge_l").p_value == 1.0
