"""Four questions answered first: smaller, faster, as good, within limits? And what gates did on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prunetune.report import formatting
from prunetune.report.run_folder import RunFiles, get_mapping, get_number, lookup
from prunetune.report.scores import REFERENCE_NAMES, HeadlineScore, TaskMetricRow, reference_model
from prunetune.report.speed import interleaved_ratio, separate_ratio

VerdictAnswer = Literal["yes", "no", "partly", "unknown", "none"]
MAX_HIDDEN_LOSS = 0.1  # a share of the reference's score: noise that could hide a larger loss answers nothing


@dataclass(frozen=True)
class RunVerdict:
    """One question with its answer in a word and in a sentence."""

    question: str
    answer: VerdictAnswer
    explanation: str


@dataclass(frozen=True)
class LimitVerdict:
    """A gate and how it stood when the run ended."""

    condition: str
    limit: str
    measured: str
    passed: bool


@dataclass(frozen=True)
class LimitEvent:
    """Something that a gate did."""

    steps: tuple[str, ...]
    action: str
    limits: str


def run_verdicts(run: RunFiles, headline: HeadlineScore | None, rows: Sequence[TaskMetricRow]) -> list[RunVerdict]:
    """The answers that the files allow; the rest is not known."""
    return [
        _size_verdict(run.manifest),
        _speed_verdict(run.manifest),
        _quality_verdict(run, headline, rows),
        _limits_verdict(run.manifest),
    ]


def _size_verdict(manifest: Mapping[str, Any]) -> RunVerdict:
    dense, pruned = get_number(manifest, "model", "decoder_params"), get_number(manifest, "pruned", "decoder_params")
    if not dense or pruned is None:
        return RunVerdict("Smaller?", "unknown", "Sizes are not known.")
    kept = pruned / dense
    words = f"{formatting.share(1 - kept)} of the decoder's parameters are gone: {formatting.short(dense)} → {formatting.short(pruned)}."
    asked, allowed = get_number(manifest, "gates", "keep_asked"), get_number(manifest, "gates", "kept")
    if asked is not None and allowed is not None and allowed > asked:
        words += f" {formatting.share(asked)} was to stay; a gate held {formatting.share(allowed)}."
        return RunVerdict("Smaller?", "partly", words)
    return RunVerdict("Smaller?", "yes" if kept < 1 else "no", words)


def _speed_verdict(manifest: Mapping[str, Any]) -> RunVerdict:
    """As measured in turns where the run did that, else one after the other: no plain yes where noise is the larger."""
    kinds = ("throughput", "decode", "prefill")
    found = {kind: times for kind in kinds if (times := interleaved_ratio(manifest, kind))}
    found = found or {kind: times for kind in kinds if (times := separate_ratio(manifest, kind))}
    if not found:
        return RunVerdict("Faster?", "unknown", "Speed was not measured.")
    words = ", ".join(f"{kind} {times}" for kind, times in found.items()) + " of the dense model's speed."
    clear = {kind: times.ratio for kind, times in found.items() if times.is_significant}
    if len(clear) < len(found):
        noisy = " and ".join(kind for kind in found if kind not in clear)
        words += f" Runs of {noisy} differ more than the models: prunetune bench measures them in turns."
    if not clear:
        return RunVerdict("Faster?", "unknown", words[:1].upper() + words[1:])
    faster = [kind in clear and clear[kind] > 1 for kind in found]
    return RunVerdict(
        "Faster?", "yes" if all(faster) else "partly" if any(faster) else "no", words[:1].upper() + words[1:]
    )


def _quality_verdict(run: RunFiles, headline: HeadlineScore | None, rows: Sequence[TaskMetricRow]) -> RunVerdict:
    if headline is None:
        return RunVerdict("As good?", "unknown", "There are no scores to compare.")
    judged = [row for row in rows if row.is_headline and row.verdict]
    worse = [row.task for row in judged if row.verdict == "worse"]
    name = reference_model(run.evaluations)
    reference, count = REFERENCE_NAMES[name], f"{len(judged)} task{'s' * (len(judged) != 1)}"
    if not judged:
        return RunVerdict("As good?", "unknown", f"No task says so beyond doubt; {reference} is the reference.")
    if not worse and name != "tuned":  # that says that tuning helped, not that pruning did no harm
        return RunVerdict("As good?", "unknown", "Not worse than the untuned model; a dense tuned one was not scored.")
    if not worse and (hidden := _hidden(judged)):
        return RunVerdict("As good?", "unknown", hidden)
    if not worse:
        return RunVerdict(
            "As good?", "yes", f"Not worse than the {reference} model, beyond two standard errors, in {count}."
        )
    named = ", ".join(formatting.truncated(task) for task in worse[:3])
    named += f" and {len(worse) - 3} more" if len(worse) > 3 else ""
    words = f"In {len(worse)} of {count} worse than the {reference} model beyond two standard errors: {named}."
    return RunVerdict("As good?", "no" if len(worse) == len(judged) else "partly", words)


def _hidden(judged: Sequence[TaskMetricRow]) -> str:
    """The largest loss that noise could hide, where that is too much to call a model as good; else empty."""
    losses = [
        (1 - row.recovery_with_se[0] + 2 * row.recovery_with_se[1], row)
        for row in judged
        if row.verdict == "within noise"
    ]
    known = [pair for pair in losses if not math.isnan(pair[0])]  # of a score of 0 there is no share
    loss, row = max(known, key=lambda pair: pair[0], default=(0.0, None))
    if row is None or not loss > MAX_HIDDEN_LOSS:
        return ""
    items = f"{formatting.count(row.n)} item{'s' * (row.n != 1)}"
    return (
        f"Not worse beyond two standard errors, but these are wide: with {items}, up to "
        f"{formatting.share(min(1.0, loss))} of {formatting.truncated(row.task)} may be lost. Score more (evaluate.limit)."
    )


def _limits_verdict(manifest: Mapping[str, Any]) -> RunVerdict:
    failed = lookup(manifest, "failed")
    if isinstance(failed, str) and failed:
        return RunVerdict("Within limits?", "no", f"{failed[:1].upper()}{failed[1:]}.")
    found = limit_verdicts(manifest)
    if not found:
        return RunVerdict("Within limits?", "none", "No gate was set.")
    outside = [limit for limit in found if not limit.passed]
    if outside:
        return RunVerdict(
            "Within limits?", "no", f"{outside[0].condition}: {outside[0].measured}, limit {outside[0].limit}."
        )
    acted = len(_event_entries(manifest))
    words = f"{'The gate' if len(found) == 1 else f'All {len(found)} gates'} held at the end"
    return RunVerdict("Within limits?", "yes", words + (f", after acting {_times(acted)}." if acted else "."))


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def limit_verdicts(manifest: Mapping[str, Any]) -> list[LimitVerdict]:
    """The gates of a run, and the margins that its gain had to reach."""
    listed = [one for part in ("gates", "gain") for one in _listed(manifest, part, "limits")]
    return [
        LimitVerdict(
            str(one.get("gate", "")),
            formatting.decimal(get_number(one, "limit")),
            formatting.decimal(get_number(one, "found")),
            one.get("held") is True,
        )
        for one in listed
        if isinstance(one, Mapping)
    ]


def misaligned_widths(manifest: Mapping[str, Any]) -> list[str]:
    """Widths that keep a model from the margin it missed; none where it reached it."""
    missed = any(isinstance(one, Mapping) and one.get("held") is False for one in _listed(manifest, "gain", "limits"))
    return [str(words) for words in _listed(manifest, "gain", "uneven")] if missed else []


def _listed(manifest: Mapping[str, Any], *path: str) -> list[Any]:
    found = lookup(manifest, *path)
    return found if isinstance(found, list) else []


def limit_events(manifest: Mapping[str, Any]) -> list[LimitEvent]:
    """What gates did, in order; what was done again and again is one event."""
    made: list[LimitEvent] = []
    for one in _event_entries(manifest):
        event = LimitEvent(
            (formatting.count(get_number(one, "step")),), str(one.get("did", "")), _joined(one.get("gates"))
        )
        if made and (made[-1].action, made[-1].limits) == (event.action, event.limits):
            made[-1] = LimitEvent((*made[-1].steps, *event.steps), event.action, event.limits)
        else:
            made.append(event)
    return made


def _event_entries(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in _listed(manifest, "gates", "events") if isinstance(one, Mapping)]


def _joined(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def monitored_metrics(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, of the dense model as the run began, of what the run ended with)."""
    dense, last = get_mapping(manifest, "validation", "dense"), get_mapping(manifest, "validation", "last")
    names = [str(name) for name in (*dense, *(name for name in last if name not in dense))] if dense else []
    return [
        (name, formatting.decimal(get_number(dense, name)), formatting.decimal(get_number(last, name)))
        for name in names
    ]
