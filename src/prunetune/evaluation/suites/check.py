"""Check a model's scores against limits and a reference model: broken limits, and items that it newly gets wrong."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prunetune.errors import DataError, PrunetuneError
from prunetune.evaluation.paired import PairedComparison, compare_paired, holm
from prunetune.evaluation.results import (
    MAX_PROMPT_CHARS,
    Evaluation,
    Item,
    Score,
    TaskResult,
    higher_is_better,
    recovery,
)
from prunetune.evaluation.statistics import PER_ITEM_METRIC, is_same_question, keep_same_questions, paired_difference
from prunetune.evaluation.suites.suite import Suite, Task
from prunetune.evaluation.suites.suite_limits import SuiteLimit
from prunetune.utils.redaction import SHOW_ALL, Redaction

FORMAT = "prunetune-check-1"
MAX_GRADED_FAILURES = 10  # items listed of a task whose items are neither right nor wrong


@dataclass(frozen=True)
class Verdict:
    """One limit, and whether it is broken."""

    limit: SuiteLimit
    broken: bool
    value: float
    reference: float  # nan where there is none
    says: str  # one line to print
    p: float = math.nan  # of statistical limits: corrected p-value


@dataclass(frozen=True)
class Failure:
    """An item that the reference got right and the model does not; or, of graded scores, one that lost the most."""

    task: str
    id: str
    prompt: str
    expected: str
    before: str  # the reference's answer
    after: str
    metric: str  # the task's first metric, or its value in one item (perplexity: nll)
    score_before: float  # nan where the item has no such score
    score_after: float
    lost: float  # positive is worse

    @property
    def score_change(self) -> str:
        """Both scores of a graded item; "" where the answers say it: right before, wrong now."""
        before, after = self.score_before, self.score_after
        if math.isnan(before) or (before, after) == (1, 0):
            return ""
        return f"{self.metric} {before:.4g} before, {after:.4g} after"


@dataclass(frozen=True)
class CheckResult:
    """The outcome of a check: verdicts, new failures, errors and both models' scores."""

    verdicts: tuple[Verdict, ...]
    failures: tuple[Failure, ...]
    errors: dict[str, str]  # task -> why it could not be judged
    scores: dict[str, dict[str, tuple[float, float]]]  # task -> metric -> the model's and the reference's
    reference: str = ""  # what the model was compared with
    # task -> metric -> the model's minus the reference's over common items, and its standard error
    differences: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """The verdicts on limits that are broken."""
        return tuple(verdict for verdict in self.verdicts if verdict.broken)

    @property
    def exit_code(self) -> int:
        """1 where a limit is broken, else 2 where a task could not be judged, else 0."""
        return 1 if self.broken else 2 if self.errors else 0

    def to_json(self) -> str:
        """The whole result as JSON text; nan and inf become null."""
        plain = {"format": FORMAT, "ok": self.exit_code == 0, **asdict(self)}
        return json.dumps(_finite(plain), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def check_limits(
    evaluation: Evaluation, reference: Evaluation | None, suite: Suite, redaction: Redaction = SHOW_ALL
) -> CheckResult:
    """Check scores against the suite's limits; a task without any must not be significantly worse than `reference`.

    Without a reference only the limits `min` and `max` can be judged; the others are errors of their tasks.
    """
    if reference and (evaluation.is_hidden or reference.is_hidden):
        evaluation, reference = evaluation.by_line(), reference.by_line()
    errors = {name: result.error for name, result in evaluation.tasks.items() if result.error}
    for name, result in (reference.tasks if reference else {}).items():
        if result.error and name not in errors:
            errors[name] = f"the reference: {result.error}"
    for task in suite.tasks:
        if not any(_task(suite, name) is task for name in evaluation.tasks):
            errors[task.name] = task.error or "not among the results; evaluate the suite again"
    verdicts: list[Verdict] = []
    for name, result in evaluation.tasks.items():
        for limit in _limits(suite, name, result, reference) if name not in errors else ():
            try:
                verdicts.append(_verdict(limit, result, reference.tasks.get(name) if reference else None))
            except PrunetuneError as error:
                errors[name] = str(error)
    pairs = _scored_pairs(evaluation, reference, errors)
    failures = tuple(failure for mine, theirs in pairs for failure in new_failures(mine, theirs, redaction))
    scores = {mine.task: _side_by_side(mine, theirs) for mine, theirs in _all_pairs(evaluation, reference)}
    differences = {mine.task: _paired_differences(mine, theirs) for mine, theirs in pairs}
    verdicts = _corrected(verdicts, suite.correction)
    return CheckResult(tuple(verdicts), failures, errors, scores, differences=differences)


class LimitNotApplicable(PrunetuneError):
    """A limit on a metric that the model or the reference does not have."""


def _task(suite: Suite, name: str) -> Task | None:
    """The task that a result belongs to: that of its name, or the lm-eval group of "group/task"."""
    matching = [
        task for task in suite.tasks if task.name == name or (task.options.lm_eval and name.startswith(f"{task.name}/"))
    ]
    return max(matching, key=lambda task: len(task.name), default=None)


def _limits(suite: Suite, name: str, result: TaskResult, reference: Evaluation | None) -> list[SuiteLimit]:
    """The limits of a task; those of a group of lm-eval hold for each of its tasks."""
    task = _task(suite, name)
    limits = [replace(limit, task=name) for limit in task.limits] if task else []
    if limits or reference is None or not result.scores:
        return limits
    return [SuiteLimit(name, next(iter(result.scores)), "statistical", suite.level)]


def _verdict(limit: SuiteLimit, mine: TaskResult, theirs: TaskResult | None) -> Verdict:
    if limit.metric not in mine.scores:
        raise LimitNotApplicable(
            f"task {limit.task} has no {limit.metric}; it has {', '.join(mine.scores) or 'no scores'}"
        )
    if limit.kind not in ("min", "max") and (theirs is None or limit.metric not in theirs.scores):
        raise LimitNotApplicable(
            f"task {limit.task}: a {limit.kind} limit on {limit.metric} needs a reference that has it"
        )
    value = mine.scores[limit.metric].value
    other = theirs.scores[limit.metric] if theirs and limit.metric in theirs.scores else Score(math.nan, math.nan, 0)
    if math.isnan(value):
        return Verdict(limit, True, value, other.value, f"{_metric_label(limit)} is not a number")
    if limit.kind not in ("min", "max") and theirs is not None:
        keep_same_questions(limit.task, _common(mine, theirs))  # raises where the reference has other rows
    if limit.kind == "statistical":
        assert theirs is not None
        return _judge_statistical(limit, value, other.value, compare_paired(mine, theirs, limit.metric))
    holds, bound = _is_within_bound(limit, mine.scores[limit.metric], other)
    return Verdict(limit, not holds, value, other.value, f"{_metric_label(limit)} is {value:.4g}, {bound}")


def _is_within_bound(limit: SuiteLimit, value: Score, other: Score) -> tuple[bool, str]:
    if limit.kind == "min":
        return value.value >= limit.bound, f"at least {limit.bound:.4g} is required"
    if limit.kind == "max":
        return value.value <= limit.bound, f"at most {limit.bound:.4g} is required"
    if limit.kind == "relative":
        share = recovery(value, other, limit.metric)
        # A reference score of 0 cannot be fallen below.
        holds = share >= limit.bound or (math.isnan(share) and other.value == 0)
        return holds, f"{100 * share:.1f}% of the reference's {other.value:.4g}; {100 * limit.bound:g}% are required"
    lost = _deterioration(value.value - other.value, limit.metric)
    return (
        lost <= limit.bound,
        f"{lost:.4g} worse than the reference's {other.value:.4g}; {limit.bound:.4g} may be lost",
    )


def _deterioration(difference: float, metric: str) -> float:
    """The difference with its sign turned so that positive is worse."""
    return -difference if higher_is_better(metric) else difference


def _judge_statistical(limit: SuiteLimit, value: float, other: float, paired: PairedComparison) -> Verdict:
    """A verdict with its raw p-value; `_corrected` decides, once all p-values are known."""
    says = (
        f"{_metric_label(limit)} is {value:.4g}, the reference's {other:.4g} ({paired.test}, {paired.items} items, "
        f"difference {paired.difference:+.4g}, 95% {paired.ci_low:+.4g} to {paired.ci_high:+.4g}"
    )
    worse = _deterioration(paired.difference, limit.metric) > 0
    return Verdict(limit, worse or math.isnan(paired.difference), value, other, says, paired.p_value)


def _corrected(verdicts: Sequence[Verdict], correction: str) -> list[Verdict]:
    """Statistical limits are broken where the model is worse and the corrected p-value is at most the level."""
    tested = [
        index
        for index, verdict in enumerate(verdicts)
        if verdict.limit.kind == "statistical" and not math.isnan(verdict.value)
    ]
    raw = [verdicts[index].p for index in tested]
    values = holm(raw) if correction == "holm" else raw
    result = list(verdicts)
    for index, p in zip(tested, values, strict=True):
        verdict = verdicts[index]
        significant = not p > verdict.limit.bound
        says = f"{verdict.says}, p {_format_p_value(p)}{' after Holm' if correction == 'holm' else ''})"
        result[index] = replace(verdict, broken=verdict.broken and significant, says=says, p=p)
    return result


def _format_p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _metric_label(limit: SuiteLimit) -> str:
    return f"{limit.task}: {limit.metric}"


def new_failures(mine: TaskResult, theirs: TaskResult, redaction: Redaction = SHOW_ALL) -> list[Failure]:
    """Items right before and wrong now; of graded items, the `MAX_GRADED_FAILURES` that lost most of the first metric.

    Items of the same id with another question do not count.
    """
    pairs = [pair for pair in _common(mine, theirs) if is_same_question(*pair)]
    metric = next(iter(mine.scores), "")
    if any(old.correct is not None for _, old in pairs):
        pairs = [(now, old) for now, old in pairs if old.correct and not now.correct]
        return [_failure(mine.task, now, old, metric, redaction) for now, old in pairs]
    graded = [_failure(mine.task, now, old, metric, redaction) for now, old in pairs]
    graded = sorted(
        (failure for failure in graded if failure.lost > 0), key=lambda failure: (-failure.lost, failure.id)
    )
    return graded[:MAX_GRADED_FAILURES]


def _common(mine: TaskResult, theirs: TaskResult) -> list[tuple[Item, Item]]:
    before = {item.id: item for item in theirs.items}
    return [(item, before[item.id]) for item in mine.items if item.id in before]


def _failure(task: str, now: Item, old: Item, metric: str, redaction: Redaction) -> Failure:
    now, old = now.redacted(redaction), old.redacted(redaction)
    evidence = PER_ITEM_METRIC.get(metric, metric)
    before, after = old.scores.get(evidence, math.nan), now.scores.get(evidence, math.nan)
    lost = _deterioration(after - before, evidence)
    prompt = now.prompt[:MAX_PROMPT_CHARS]
    return Failure(task, now.id, prompt, now.expected, old.got, now.got, evidence, before, after, lost)


def _scored_pairs(
    evaluation: Evaluation, reference: Evaluation | None, errors: dict[str, str]
) -> list[tuple[TaskResult, TaskResult]]:
    return [(mine, theirs) for mine, theirs in _all_pairs(evaluation, reference) if theirs and mine.task not in errors]


def _all_pairs(evaluation: Evaluation, reference: Evaluation | None) -> list[tuple[TaskResult, TaskResult | None]]:
    return [(mine, reference.tasks.get(name) if reference else None) for name, mine in evaluation.tasks.items()]


def _side_by_side(mine: TaskResult, theirs: TaskResult | None) -> dict[str, tuple[float, float]]:
    others = theirs.scores if theirs else {}
    return {
        metric: (score.value, others[metric].value if metric in others else math.nan)
        for metric, score in mine.scores.items()
    }


def _paired_differences(mine: TaskResult, theirs: TaskResult) -> dict[str, tuple[float, float]]:
    differences = {}
    for metric in mine.scores:
        with suppress(DataError):  # no item has it in both
            difference = paired_difference(mine, theirs, metric)
            differences[metric] = difference.value, difference.se
    return differences


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
