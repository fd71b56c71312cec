"""Paired tests of two models on the same items: exact McNemar, randomisation, bootstrap intervals, Holm's correction.

All p-values are two-sided. Items that are right or wrong are tested by McNemar's test (Psychometrika 12, 1947) in its
exact form; others by approximate randomisation (Noreen 1989): if the models are alike, it does not matter which of
them gave which of an item's two answers, so the answers are swapped at random. That keeps its significance level
however few items there are. The interval of the difference is a bootstrap over items (Efron and Tibshirani 1993,
chapter 13).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prunetune.evaluation.results import Item, TaskResult
from prunetune.evaluation.statistics import Array, Statistic, paired_items, statistic_for_metric

RESAMPLES = 9999
INTERVAL = (0.025, 0.975)
CHUNK = 2**22  # resampled weights in memory at once: 32 MiB


@dataclass(frozen=True)
class PairedComparison:
    """The difference of two models' scores on the same items, and whether it can be chance."""

    difference: float  # first minus second
    ci_low: float  # 95% bootstrap interval of the difference; nan for fewer than 2 items
    ci_high: float
    p_value: float  # two-sided; nan where a score is
    items: int
    test: str  # "McNemar" or "randomisation"


def compare_paired(a: TaskResult, b: TaskResult, metric: str, *, seed: int = 0) -> PairedComparison:
    """Compare `a` with `b`; raises `DataError` where the two have too few items in common."""
    left, right = paired_items(a, b, metric)
    n, statistic = len(left), _joint(left, right, metric)

    def gap(first: Array) -> Array:
        """How often each item counts, [resamples, n] -> `a` minus `b`, [resamples]."""
        none = np.zeros_like(first)
        return statistic(np.hstack([first, none])) - statistic(np.hstack([none, first]))

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        difference = float(gap(np.ones((1, n)))[0])
        if not math.isfinite(difference):
            return PairedComparison(difference, math.nan, math.nan, math.nan, n, "randomisation")
        low, high = _interval(gap, n, seed)
        is_mean = statistic_for_metric(metric) is None
        if is_mean and all(item.scores[metric] in (0.0, 1.0) for item in (*left, *right)):
            lost = sum(x.scores[metric] < y.scores[metric] for x, y in zip(left, right, strict=True))
            won = sum(x.scores[metric] > y.scores[metric] for x, y in zip(left, right, strict=True))
            return PairedComparison(difference, low, high, mcnemar(lost, won), n, "McNemar")
        p_value = _randomised(statistic, difference, n, seed)
        return PairedComparison(difference, low, high, p_value, n, "randomisation")


def _joint(left: Sequence[Item], right: Sequence[Item], metric: str) -> Statistic:
    """The metric over both models' items, those of `left` first; weights choose whose items count."""
    items, make_statistic = [*left, *right], statistic_for_metric(metric)
    if make_statistic is not None:
        return make_statistic(items)
    values = np.asarray([item.scores[metric] for item in items], dtype=np.float64)
    if np.isnan(values).any():
        return lambda weights: np.full(len(weights), math.nan)
    return lambda weights: (weights @ values) / weights.sum(axis=1)


def _interval(gap: Callable[[Array], Array], n: int, seed: int) -> tuple[float, float]:
    if n < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    shares = np.full(n, 1 / n)
    drawn = [gap(generator.multinomial(n, shares, size=rows).astype(np.float64)) for rows in _chunk_sizes(n)]
    low, high = np.quantile(np.concatenate(drawn), INTERVAL)
    return float(low), float(high)


def _randomised(statistic: Statistic, difference: float, n: int, seed: int) -> float:
    """The share of random swaps after which the models differ at least as much as they do."""
    generator = np.random.default_rng(seed)
    as_far = 0
    for rows in _chunk_sizes(n):
        own = generator.integers(0, 2, size=(rows, n)).astype(np.float64)
        gaps = statistic(np.hstack([own, 1 - own])) - statistic(np.hstack([1 - own, own]))
        # The tolerance lets differences count as equal that rounding separated.
        as_far += int((np.abs(gaps) >= abs(difference) * (1 - 1e-9)).sum())
    return (1 + as_far) / (1 + RESAMPLES)


def _chunk_sizes(n: int) -> Iterator[int]:
    left, size = RESAMPLES, max(1, CHUNK // (2 * n))
    while left > 0:
        yield min(left, size)
        left -= size


def mcnemar(lost: int, won: int) -> float:
    """Exact p-value: the chance of a split at least as uneven among changed items, if either change is as likely."""
    changed, few = lost + won, min(lost, won)
    log_terms = [
        math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1) - changed * math.log(2)
        for k in range(few + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in log_terms))


def holm(values: Sequence[float]) -> list[float]:
    """Corrected p-values: the chance of any false alarm among them is at most the level (Holm 1979); nan stays nan."""
    order = sorted((value, index) for index, value in enumerate(values) if not math.isnan(value))
    adjusted, highest = list(values), 0.0
    for rank, (value, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * value))
        adjusted[index] = highest
    return adjusted
