"""Scores of the three models side by side, and what is left of the dense model's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prunetune.errors import DataError
from prunetune.evaluation.results import HEADLINE_METRICS, Evaluation, Score, TaskResult, higher_is_better, recovery
from prunetune.evaluation.statistics import paired_difference
from prunetune.report import formatting

LABELS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "nll": "NLL per token",
    "perplexity": "perplexity",
}
ORDER = (*HEADLINE_METRICS, *(metric for metric in LABELS if metric not in HEADLINE_METRICS))
REFERENCE_NAMES = {"tuned": "dense tuned", "dense": "dense untuned"}


@dataclass(frozen=True)
class TaskMetricRow:
    """One metric of one task over the models."""

    task: str
    metric: str
    scores: Mapping[str, Score]  # by model: "dense", "tuned", "pruned"
    n: int
    is_headline: bool  # the metric that stands for its task
    recovery: str  # share of the reference that is left
    change: str  # pruned minus reference, with its standard error
    verdict: str  # "worse", "better", "within noise", or "" where that is not known
    recovery_with_se: tuple[float, float] = (math.nan, math.nan)  # recovery as a number, and its standard error

    @property
    def label(self) -> str:
        """The metric's name for readers."""
        return LABELS.get(self.metric, self.metric)


@dataclass(frozen=True)
class HeadlineScore:
    """The mean of one metric over the tasks that have it."""

    metric: str
    reference_name: str  # "dense tuned" or "dense untuned"
    tasks: int
    means: Mapping[str, float]  # by model, where it scored all these tasks; "pruned" and the reference always
    pruned_se: float
    reference: float
    recovery: float | None  # None for losses, and against an untuned model

    @property
    def label(self) -> str:
        """The metric's name for readers."""
        return LABELS.get(self.metric, self.metric)

    @property
    def pruned(self) -> float:
        """The pruned model's mean."""
        return self.means["pruned"]


def reference_model(evaluations: Mapping[str, Evaluation]) -> str:
    """The model that the pruned one is held against: "tuned" where it was evaluated, else "dense", else ""."""
    return next((name for name in ("tuned", "dense") if name in evaluations), "")


def metric_rows(evaluations: Mapping[str, Evaluation]) -> list[TaskMetricRow]:
    """One row for each task and metric, tasks in order of first mention, headline metrics first."""
    reference = reference_model(evaluations)
    return [
        _row(
            task,
            metric,
            {name: evaluation.tasks[task] for name, evaluation in evaluations.items() if task in evaluation.tasks},
            reference,
            first=position == 0,
        )
        for task in _ordered(task for evaluation in evaluations.values() for task in evaluation.tasks)
        for position, metric in enumerate(_metrics(evaluations, task))
    ]


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _metrics(evaluations: Mapping[str, Evaluation], task: str) -> list[str]:
    found = _ordered(
        m for evaluation in evaluations.values() if task in evaluation.tasks for m in evaluation.tasks[task].scores
    )
    return sorted(found, key=lambda metric: ORDER.index(metric) if metric in ORDER else len(ORDER))


def _row(task: str, metric: str, results: Mapping[str, TaskResult], reference: str, *, first: bool) -> TaskMetricRow:
    scores = {name: result.scores[metric] for name, result in results.items() if metric in result.scores}
    left = change = verdict = ""
    share = (math.nan, math.nan)
    if "pruned" in scores and reference in scores:
        difference, error = _difference(results["pruned"], results[reference], metric)
        left = _recovery(metric, scores["pruned"], scores[reference])
        change = formatting.signed_decimal(difference) + (
            f" ± {formatting.decimal(error)}" if math.isfinite(error) else ""
        )
        verdict = _verdict(metric, difference, error)
        share = _share(metric, scores["pruned"], scores[reference], error)
    n = max(score.n for score in scores.values())
    return TaskMetricRow(task, metric, scores, n, first, left, change, verdict, share)


def _recovery(metric: str, pruned: Score, reference: Score) -> str:
    if metric == "nll":  # a logarithm: its ratio says little, its change says all
        return ""
    left = recovery(pruned, reference, metric)
    return formatting.share(left, 1) if math.isfinite(left) else ""


def _verdict(metric: str, difference: float, error: float) -> str:
    if metric not in LABELS or not math.isfinite(difference) or not error >= 0:
        return ""
    if abs(difference) <= 2 * error:
        return "within noise"
    return "better" if (difference > 0) == higher_is_better(metric) else "worse"


def _share(metric: str, pruned: Score, reference: Score, error: float) -> tuple[float, float]:
    """Recovery, and its error to first order: that of the paired difference, over the score that is divided by."""
    ratio = recovery(pruned, reference, metric)
    below = reference.value if higher_is_better(metric) else pruned.value
    return ratio, error * (1.0 if higher_is_better(metric) else ratio) / below if below > 0 else math.nan


def _difference(pruned: TaskResult, reference: TaskResult, metric: str) -> tuple[float, float]:
    """Pruned minus reference with its standard error: paired over the same items, else as if independent."""
    ours, theirs = pruned.scores[metric], reference.scores[metric]
    try:
        paired = paired_difference(pruned, reference, metric)
    except (DataError, KeyError):  # items that were not kept, or kept without what the score is made of
        paired = Score(math.nan, math.nan, 0)
    if paired.n == ours.n == theirs.n and math.isfinite(paired.se):
        return paired.value, paired.se
    return ours.value - theirs.value, math.hypot(ours.se, theirs.se)


def headline_score(evaluations: Mapping[str, Evaluation]) -> HeadlineScore | None:
    """The mean of the first of `HEADLINES` that pruned and reference share, over the tasks that have it."""
    reference = reference_model(evaluations)
    if "pruned" not in evaluations or not reference:
        return None
    for metric in HEADLINE_METRICS:
        ours, theirs = (_finite(evaluations[name], metric) for name in ("pruned", reference))
        tasks = [task for task in ours if task in theirs]
        if tasks:
            return _mean(evaluations, reference, metric, tasks)
    return None


def _mean(evaluations: Mapping[str, Evaluation], reference: str, metric: str, tasks: list[str]) -> HeadlineScore:
    finite = {name: _finite(evaluation, metric) for name, evaluation in evaluations.items()}
    means = {
        name: math.fsum(scores[task].value for task in tasks) / len(tasks)
        for name, scores in finite.items()
        if all(task in scores for task in tasks)
    }
    return HeadlineScore(
        metric=metric,
        reference_name=REFERENCE_NAMES[reference],
        tasks=len(tasks),
        means=means,
        pruned_se=math.hypot(*(finite["pruned"][task].se for task in tasks)) / len(tasks),
        reference=means[reference],
        # More than all of an untuned model's score says that tuning helped, not that pruning cost nothing.
        recovery=means["pruned"] / means[reference]
        if reference == "tuned" and _recovers(metric, means[reference])
        else None,
    )


def _recovers(metric: str, reference: float) -> bool:
    return higher_is_better(metric) and reference > 0


def _finite(evaluation: Evaluation, metric: str) -> dict[str, Score]:
    found = {task: result.scores[metric] for task, result in evaluation.tasks.items() if metric in result.scores}
    return {task: score for task, score in found.items() if math.isfinite(score.value)}
