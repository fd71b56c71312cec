"""The four answers at the top of the page (smaller, faster, as good, within limits), and the tables of limits."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from prunetune.evaluation.results import Evaluation
from prunetune.manifest import LimitFacts, Manifest
from prunetune.report import formatting
from prunetune.report.run_folder import RunFiles
from prunetune.report.scores import REFERENCE_NAMES, HeadlineScore, TaskMetricRow, metric_rows, reference_model
from prunetune.report.speed import speedup, speedup_text

VerdictAnswer = Literal["yes", "no", "partly", "unknown", "none"]
MAX_HIDDEN_LOSS = 0.1  # a share of the reference's score: noise that could hide a larger loss answers nothing


@dataclass(frozen=True)
class RunVerdict:
    """One question with its answer in a word and in a sentence."""

    question: str
    answer: VerdictAnswer
    explanation: str


@dataclass(frozen=True)
class LimitEvent:
    """What broken limits did during the run; the same at several steps is one event."""

    steps: tuple[str, ...]
    action: str
    limits: str


def run_verdicts(run: RunFiles, headline: HeadlineScore | None, rows: Sequence[TaskMetricRow]) -> list[RunVerdict]:
    """The four answers, each "unknown" where the files do not allow one."""
    return [
        RunVerdict("Smaller?", *_size_verdict(run.manifest)),
        RunVerdict("Faster?", *_speed_verdict(run.manifest)),
        RunVerdict("As good?", *_quality_verdict(run, headline, rows)),
        RunVerdict("Within limits?", *_limits_verdict(run.manifest)),
    ]


def _size_verdict(manifest: Manifest) -> tuple[VerdictAnswer, str]:
    dense, pruned = manifest.model.decoder_params, manifest.pruned.decoder_params
    if not dense or pruned is None:
        return "unknown", "Sizes are not known."
    sizes = [("all", manifest.model.params, manifest.pruned.params), ("the decoder's", dense, pruned)]
    words = " ".join(
        f"{formatting.share(1 - left / size)} of {name} parameters are gone: {formatting.short(size)} → "
        f"{formatting.short(left)}."
        for name, size, left in sizes
        if size and left is not None
    )
    requested, allowed = manifest.limits.requested_keep, manifest.limits.kept
    if requested is not None and allowed is not None and allowed > requested:
        words += f" {formatting.share(requested)} was asked for; a limit on a score kept {formatting.share(allowed)}."
        return "partly", words
    return "yes" if pruned < dense else "no", words


def _speed_verdict(manifest: Manifest) -> tuple[VerdictAnswer, str]:
    """By measurements in turns, and by those only: a kind counts where all rounds agree on which model is faster."""
    kinds = ("throughput", "decode", "prefill")
    ratios = {kind: ratio for kind in kinds if (ratio := speedup(manifest, kind))}
    if not ratios:
        return "unknown", "Speed was not measured in turns; prunetune bench RUN does that."
    words = ", ".join(f"{kind} {speedup_text(ratio)}" for kind, ratio in ratios.items())
    words = f"{words[:1].upper()}{words[1:]} of the dense model's speed."
    noisy = [kind for kind, ratio in ratios.items() if not ratio.is_significant]
    if noisy:
        words += f" Rounds of {' and '.join(noisy)} disagree on which is faster; prunetune bench RUN measures more."
    if len(noisy) == len(ratios):
        return "unknown", words
    faster = [ratio.is_significant and (ratio.median or 0) > 1 for ratio in ratios.values()]
    return "yes" if all(faster) else "partly" if any(faster) else "no", words


def _quality_verdict(
    run: RunFiles, headline: HeadlineScore | None, rows: Sequence[TaskMetricRow]
) -> tuple[VerdictAnswer, str]:
    if headline is None:
        return "unknown", "There are no scores to compare."
    if "dense" in run.evaluations and not has_learnt(run.evaluations, "pruned"):
        is_tuned_too = "tuned" in run.evaluations and not has_learnt(run.evaluations, "tuned")
        words = f"Nothing that was learnt shows in the pruned model{', nor in the dense tuned one' * is_tuned_too}: no "
        words += "score is better than the untuned model's and than that of one answer for all rows, beyond two "
        return "no", f"{words}standard errors. Tune longer, at another learning rate, or on more data."
    judged = [row for row in rows if row.is_headline and row.verdict]
    worse = [row.task for row in judged if row.verdict == "worse"]
    reference = reference_model(run.evaluations)
    name, tasks = REFERENCE_NAMES[reference], f"{len(judged)} task{'s' * (len(judged) != 1)}"
    if not judged:
        return "unknown", f"No task says so beyond doubt; {name} is the reference."
    if worse:
        words = f"In {len(worse)} of {tasks} worse than the {name} model beyond two standard errors: {_named(worse)}."
        return "no" if len(worse) == len(judged) else "partly", words
    if reference != "tuned":  # better than untuned says that tuning helped, not that pruning did no harm
        return "unknown", "Not worse than the untuned model; a dense tuned one was not scored."
    # The largest loss that noise could hide; of a score of 0 there is no share.
    within_noise = [row for row in judged if row.verdict == "within noise"]
    losses = [(1 - row.recovery_with_se[0] + 2 * row.recovery_with_se[1], row) for row in within_noise]
    hidden = max((pair for pair in losses if not math.isnan(pair[0])), key=lambda pair: pair[0], default=None)
    if hidden and hidden[0] > MAX_HIDDEN_LOSS:
        loss, row = hidden
        words = f"Not worse beyond two standard errors, but these are wide: with {formatting.count(row.n)} "
        words += f"item{'s' * (row.n != 1)}, up to {formatting.share(min(1.0, loss))} of "
        return "unknown", f"{words}{formatting.truncated(row.task)} may be lost. Score more (evaluate.limit)."
    if likely := [row.task for row in rows if row.metric == "nll" and not row.is_headline and row.verdict == "worse"]:
        words = f"Not worse than the {name} model in {tasks}, beyond two standard errors. But right answers became "
        return "partly", f"{words}less likely (NLL per token) in {_named(likely)}."
    return "yes", f"Not worse than the {name} model, beyond two standard errors, in {tasks}."


def has_learnt(evaluations: Mapping[str, Evaluation], name: str) -> bool:
    """Whether a model is better than the untuned one in a task's own metric or loss, beyond two standard errors.

    An accuracy that one answer for all rows would reach counts for nothing.
    """
    rows = metric_rows({"dense": evaluations["dense"], "pruned": evaluations[name]})
    for row in rows:
        result = evaluations[name].tasks.get(row.task)
        if row.verdict != "better" or result is None or result.general or not (row.is_headline or row.metric == "nll"):
            continue
        answers = Counter(item.expected for item in result.items)
        constant = max(answers.values(), default=0) / max(1, len(result.items))
        if row.metric != "accuracy" or row.scores["pruned"].value > constant:
            return True
    return False


def _named(tasks: Sequence[str]) -> str:
    rest = f" and {len(tasks) - 3} more" if len(tasks) > 3 else ""
    return ", ".join(formatting.truncated(task) for task in tasks[:3]) + rest


def _limits_verdict(manifest: Manifest) -> tuple[VerdictAnswer, str]:
    if manifest.failed:
        return "no", f"{manifest.failed[:1].upper()}{manifest.failed[1:]}."
    limits = all_limits(manifest)
    if not limits:
        return "none", "No limit was set."
    broken = next((limit for limit in limits if not limit.is_met), None)
    if broken:
        measured, limit = formatting.decimal(broken.measured), formatting.decimal(broken.limit)
        return "no", f"{broken.condition}: {measured}, limit {limit}."
    words = f"{'The limit' if len(limits) == 1 else f'All {len(limits)} limits'} held at the end"
    if times := len(manifest.limits.actions):
        words += f", after acting {({1: 'once', 2: 'twice'}).get(times, f'{times} times')}"
    return "yes", f"{words}."


def all_limits(manifest: Manifest) -> tuple[LimitFacts, ...]:
    """The limits on scores, then those on the gain that was required."""
    return (*manifest.limits.limits, *manifest.gain.limits)


def misaligned_widths(manifest: Manifest) -> tuple[str, ...]:
    """Widths that keep a model from the gain it missed; none where it reached it."""
    is_missed = any(not limit.is_met for limit in manifest.gain.limits)
    return manifest.gain.misaligned_widths if is_missed else ()


def limit_events(manifest: Manifest) -> list[LimitEvent]:
    """What broken limits did, in order; what was done again and again is one event."""
    events = []
    for (action, limits), acted in groupby(manifest.limits.actions, lambda acted: (acted.action, acted.conditions)):
        steps = tuple(formatting.count(one.step) for one in acted)
        events.append(LimitEvent(steps, action, "; ".join(limits)))
    return events


def validation_scores(manifest: Manifest) -> list[tuple[str, str, str]]:
    """(metric, score of the dense model as the run began, score of what the run ended with)."""
    dense, last = manifest.validation.dense, manifest.validation.last
    names = dict.fromkeys([*dense, *last]) if dense else ()
    return [(name, formatting.decimal(dense.get(name)), formatting.decimal(last.get(name))) for name in names]
