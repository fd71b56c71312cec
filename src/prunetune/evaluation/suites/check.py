"""Check a model's scores against limits and a reference model: broken limits, and items that it newly gets wrong."""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from prunetune.errors import DataError, PrunetuneError
from prunetune.evaluation.paired import compare_paired, holm
from prunetune.evaluation.results import (
    MAX_PROMPT_CHARS,
    Evaluation,
    Score,
    TaskResult,
    common_items,
    higher_is_better,
    recovery,
)
from prunetune.evaluation.statistics import PER_ITEM_METRIC, is_same_question, keep_same_questions, paired_difference
from prunetune.evaluation.suites.suite import Suite, SuiteLimit, Task
from prunetune.utils.json_lines import finite_or_none
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
        return json.dumps(finite_or_none(plain), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def check_limits(
    evaluation: Evaluation, reference: Evaluation | None, suite: Suite, redaction: Redaction = SHOW_ALL
) -> CheckResult:
    """Check scores against the suite's limits; a task without any must not be significantly worse than `reference`.

    Without a reference only the limits `min` and `max` can be judged; the others are errors of their tasks.
    """
    if reference and (evaluation.is_hidden or reference.is_hidden):
        evaluation, reference = evaluation.by_line(), reference.by_line()
    references = reference.tasks if reference else {}
    errors = {name: result.error for name, result in evaluation.tasks.items() if result.error}
    for name, result in references.items():
        if result.error and name not in errors:
            errors[name] = f"the reference: {result.error}"
    for task in suite.tasks:
        if not any(_task(suite, name) is task for name in evaluation.tasks):
            errors[task.name] = task.error or "not among the results; evaluate the suite again"
    verdicts: list[Verdict] = []
    for name, mine in evaluation.tasks.items():
        own = _task(suite, name)  # limits of a group of lm-eval hold for each of its tasks
        limits = [replace(limit, task=name) for limit in own.limits] if own else []
        if not limits and reference is not None and mine.scores:
            limits = [SuiteLimit(name, next(iter(mine.scores)), "statistical", suite.level)]
        for limit in limits if name not in errors else ():
            try:
                verdicts.append(_judge(limit, mine, references.get(name)))
            except PrunetuneError as error:
                errors[name] = str(error)
    # Statistical limits are broken where the model is worse and the corrected p-value is at most the level.
    tested = [i for i, it in enumerate(verdicts) if it.limit.kind == "statistical" and not math.isnan(it.value)]
    raw = [verdicts[index].p for index in tested]
    for index, p in zip(tested, holm(raw) if suite.correction == "holm" else raw, strict=True):
        verdict, p_value = verdicts[index], "< 0.0001" if p < 1e-4 else f"{p:.4f}"
        says = f"{verdict.says}, p {p_value}{' after Holm' if suite.correction == 'holm' else ''})"
        verdicts[index] = replace(verdict, broken=verdict.broken and not p > verdict.limit.bound, says=says, p=p)
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    differences: dict[str, dict[str, tuple[float, float]]] = {}
    failures: list[Failure] = []
    for name, mine in evaluation.tasks.items():
        others = references[name].scores if name in references else {}
        scores[name] = {
            metric: (score.value, others[metric].value if metric in others else math.nan)
            for metric, score in mine.scores.items()
        }
        if name in references and name not in errors:
            failures += new_failures(mine, references[name], redaction)
            differences[name] = {}
            for metric in mine.scores:
                with suppress(DataError):  # no item has it in both
                    difference = paired_difference(mine, references[name], metric)
                    differences[name][metric] = difference.value, difference.se
    return CheckResult(tuple(verdicts), tuple(failures), errors, scores, differences=differences)


def _task(suite: Suite, name: str) -> Task | None:
    """The task that a result belongs to: that of its name, or the lm-eval group of "group/task"."""
    matching = [
        task for task in suite.tasks if task.name == name or (task.options.lm_eval and name.startswith(f"{task.name}/"))
    ]
    return max(matching, key=lambda task: len(task.name), default=None)


def _judge(limit: SuiteLimit, mine: TaskResult, theirs: TaskResult | None) -> Verdict:
    """The verdict on one limit; of a statistical one with the raw p-value and without its end in words."""
    metric, kind, label = limit.metric, limit.kind, f"{limit.task}: {limit.metric}"
    if metric not in mine.scores:
        raise DataError(f"task {limit.task} has no {metric}; it has {', '.join(mine.scores) or 'no scores'}")
    needs_reference = kind not in ("min", "max")
    if needs_reference and (theirs is None or metric not in theirs.scores):
        raise DataError(f"task {limit.task}: a {kind} limit on {metric} needs a reference that has it")
    score, value = mine.scores[metric], mine.scores[metric].value
    other = theirs.scores[metric] if theirs and metric in theirs.scores else Score(math.nan, math.nan, 0)
    if math.isnan(value):
        return Verdict(limit, True, value, other.value, f"{label} is not a number")
    if needs_reference and theirs is not None:
        keep_same_questions(limit.task, common_items(mine, theirs))  # raises where the reference has other rows
    if kind == "statistical" and theirs is not None:
        paired = compare_paired(mine, theirs, metric)
        says = (
            f"{label} is {value:.4g}, the reference's {other.value:.4g} ({paired.test}, {paired.items} items, "
            f"difference {paired.difference:+.4g}, 95% {paired.ci_low:+.4g} to {paired.ci_high:+.4g}"
        )
        worse = _deterioration(paired.difference, metric) > 0 or math.isnan(paired.difference)
        return Verdict(limit, worse, value, other.value, says, paired.p_value)
    if kind == "min":
        holds, bound = value >= limit.bound, f"at least {limit.bound:.4g} is required"
    elif kind == "max":
        holds, bound = value <= limit.bound, f"at most {limit.bound:.4g} is required"
    elif kind == "relative":
        share = recovery(score, other, metric)
        # A reference score of 0 cannot be fallen below.
        holds = share >= limit.bound or (math.isnan(share) and other.value == 0)
        bound = f"{100 * share:.1f}% of the reference's {other.value:.4g}; {100 * limit.bound:g}% are required"
    else:
        lost = _deterioration(value - other.value, metric)
        holds = lost <= limit.bound
        bound = f"{lost:.4g} worse than the reference's {other.value:.4g}; {limit.bound:.4g} may be lost"
    return Verdict(limit, not holds, value, other.value, f"{label} is {value:.4g}, {bound}")


def _deterioration(difference: float, metric: str) -> float:
    """The difference with its sign turned so that positive is worse."""
    return -difference if higher_is_better(metric) else difference


def new_failures(mine: TaskResult, theirs: TaskResult, redaction: Redaction = SHOW_ALL) -> list[Failure]:
    """Items right before and wrong now; of graded items, the `MAX_GRADED_FAILURES` that lost most of the first metric.

    Items of the same id with another question do not count.
    """
    metric = next(iter(mine.scores), "")
    evidence = PER_ITEM_METRIC.get(metric, metric)
    pairs = [pair for pair in common_items(mine, theirs) if is_same_question(*pair)]
    is_graded = all(old.correct is None for _, old in pairs)
    failures = []
    for now, old in pairs:
        before, after = old.scores.get(evidence, math.nan), now.scores.get(evidence, math.nan)
        lost = _deterioration(after - before, evidence)
        if lost > 0 if is_graded else old.correct and not now.correct:
            now, old = now.redacted(redaction), old.redacted(redaction)
            texts = (now.id, now.prompt[:MAX_PROMPT_CHARS], now.expected, old.got, now.got)
            failures.append(Failure(mine.task, *texts, evidence, before, after, lost))
    worst_first = sorted(failures, key=lambda failure: (-failure.lost, failure.id))
    return worst_first[:MAX_GRADED_FAILURES] if is_graded else failures
