"""The score table: dense, tuned and pruned model by task and metric, with recovery and paired change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from prunetune.errors import DataError
from prunetune.evaluation.results import (
    HEADLINE_METRICS,
    Evaluation,
    Score,
    TaskResult,
    headline_metric,
    higher_is_better,
    recovery,
)
from prunetune.evaluation.statistics import paired_difference
from prunetune.report import formatting

LABELS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "nll": "NLL per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
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
    """The model that the pruned one is compared with: "tuned" where it was evaluated, else "dense", else ""."""
    return next((name for name in ("tuned", "dense") if name in evaluations), "")


def metric_rows(evaluations: Mapping[str, Evaluation]) -> list[TaskMetricRow]:
    """One row for each task and metric, tasks in order of first mention, headline metrics first."""
    reference = reference_model(evaluations)
    rows = []
    for task in dict.fromkeys(task for evaluation in evaluations.values() for task in evaluation.tasks):
        results = {name: evaluation.tasks[task] for name, evaluation in evaluations.items() if task in evaluation.tasks}
        metrics = dict.fromkeys(metric for result in results.values() for metric in result.scores)
        ordered = sorted(metrics, key=lambda metric: ORDER.index(metric) if metric in ORDER else len(ORDER))
        rows += [
            _metric_row(task, metric, results, reference, is_headline=position == 0)
            for position, metric in enumerate(ordered)
        ]
    return rows


def _metric_row(
    task: str, metric: str, results: Mapping[str, TaskResult], reference: str, *, is_headline: bool
) -> TaskMetricRow:
    scores = {name: result.scores[metric] for name, result in results.items() if metric in result.scores}
    recovered = change = verdict = ""
    with_se = (math.nan, math.nan)
    if "pruned" in scores and reference in scores:
        after, before = scores["pruned"], scores[reference]
        try:
            paired = paired_difference(results["pruned"], results[reference], metric)
        except (DataError, KeyError):  # items that were not kept, or kept without what the score is made of
            paired = Score(math.nan, math.nan, 0)
        difference, error = paired.value, paired.se
        if not (paired.n == after.n == before.n and math.isfinite(error)):  # over other items: as if independent
            difference, error = after.value - before.value, math.hypot(after.se, before.se)
        change = formatting.signed_decimal(difference)
        change += f" ± {formatting.decimal(error)}" if math.isfinite(error) else ""
        is_higher = higher_is_better(metric)
        if metric in LABELS and math.isfinite(difference) and error >= 0:
            is_noise = abs(difference) <= 2 * error
            verdict = "within noise" if is_noise else "better" if (difference > 0) == is_higher else "worse"
        # To first order, the error of the paired difference over the score that is divided by.
        ratio, divisor = recovery(after, before, metric), (before if is_higher else after).value
        with_se = ratio, error * (1.0 if is_higher else ratio) / divisor if divisor > 0 else math.nan
        if metric != "nll" and math.isfinite(ratio):  # of a logarithm the ratio says little, the change all
            recovered = formatting.share(ratio, 1)
    n = max(score.n for score in scores.values())
    return TaskMetricRow(task, metric, scores, n, is_headline, recovered, change, verdict, with_se)


def headline_score(evaluations: Mapping[str, Evaluation]) -> HeadlineScore | None:
    """The mean of the first of `HEADLINE_METRICS` that pruned and reference share, over the tasks that have it."""
    reference = reference_model(evaluations)
    if "pruned" not in evaluations or not reference:
        return None
    for metric in HEADLINE_METRICS:
        finite = {
            name: {
                task: result.scores[metric]
                for task, result in evaluation.tasks.items()
                if metric in result.scores and not result.general and math.isfinite(result.scores[metric].value)
            }
            for name, evaluation in evaluations.items()
        }
        tasks = [task for task in finite["pruned"] if task in finite[reference]]
        if not tasks:
            continue
        means = {
            name: math.fsum(scores[task].value for task in tasks) / len(tasks)
            for name, scores in finite.items()
            if all(task in scores for task in tasks)
        }
        # More than all of an untuned model's score says that tuning helped, not that pruning cost nothing.
        has_recovery = reference == "tuned" and higher_is_better(metric) and means[reference] > 0
        return HeadlineScore(
            metric=metric,
            reference_name=REFERENCE_NAMES[reference],
            tasks=len(tasks),
            means=means,
            pruned_se=math.hypot(*(finite["pruned"][task].se for task in tasks)) / len(tasks),
            reference=means[reference],
            recovery=means["pruned"] / means[reference] if has_recovery else None,
        )
    return None


def headline_table(evaluations: Mapping[str, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Each task's headline score of every model, and the share that the pruned one keeps of the reference.

    Headings of numbers begin with ">", as `table_lines` takes them.
    """
    titles = {"pruned": ">pruned", "tuned": ">dense tuned", "dense": ">dense"}
    models = [name for name in titles if name in evaluations]
    reference = evaluations.get("tuned", evaluations.get("dense"))
    rows = []
    for task, result in evaluations["pruned"].tasks.items() if "pruned" in evaluations else ():
        metric = headline_metric(result)
        scores = [evaluations[name].tasks[task].scores[metric] for name in models]
        share = recovery(scores[0], reference.tasks[task].scores[metric], metric) if reference else math.nan
        pruned, *others = (f"{score.value:.3f} ±{score.se:.3f}" for score in scores)
        rows.append([task, metric, pruned, f"{100 * share:.0f}%" if math.isfinite(share) else "–", *others])
    share_title = ">recovery" if "tuned" in evaluations else ">of dense"
    return ["task", "metric", ">pruned", share_title, *(titles[name] for name in models[1:])], rows
