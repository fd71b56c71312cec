"""Four questions answered first: smaller, faster, as good, within limits? And what gates did on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prunetune.report import text
from prunetune.report.run_folder import RunFiles, lookup, mapping, number
from prunetune.report.scores import REFERENCE_NAMES, Headline, Row, reference_of
from prunetune.report.speed import in_turns, one_by_one

Reading = Literal["yes", "no", "partly", "unknown", "none"]
HIDDEN = 0.1  # a share of the reference's score: noise that could hide a larger loss answers nothing


@dataclass(frozen=True)
class Answer:
    """One question with its answer in a word and in a sentence."""

    question: str
    reading: Reading
    words: str


@dataclass(frozen=True)
class Limit:
    """A gate and how it stood when the run ended."""

    gate: str
    limit: str
    found: str
    held: bool


@dataclass(frozen=True)
class Event:
    """Something that a gate did."""

    steps: tuple[str, ...]
    did: str
    gates: str


def answers(run: RunFiles, headline: Headline | None, rows: Sequence[Row]) -> list[Answer]:
    """The answers that the files allow; the rest is not known."""
    return [_smaller(run.manifest), _faster(run.manifest), _as_good(run, headline, rows), _within(run.manifest)]


def _smaller(manifest: Mapping[str, Any]) -> Answer:
    dense, pruned = number(manifest, "model", "decoder_params"), number(manifest, "pruned", "decoder_params")
    if not dense or pruned is None:
        return Answer("Smaller?", "unknown", "Sizes are not known.")
    kept = pruned / dense
    words = f"{text.share(1 - kept)} of the decoder's parameters are gone: {text.short(dense)} → {text.short(pruned)}."
    asked, allowed = number(manifest, "gates", "keep_asked"), number(manifest, "gates", "kept")
    if asked is not None and allowed is not None and allowed > asked:
        words += f" {text.share(asked)} was to stay; a gate held {text.share(allowed)}."
        return Answer("Smaller?", "partly", words)
    return Answer("Smaller?", "yes" if kept < 1 else "no", words)


def _faster(manifest: Mapping[str, Any]) -> Answer:
    """As measured in turns where the run did that, else one after the other: no plain yes where noise is the larger."""
    kinds = ("throughput", "decode", "prefill")
    found = {kind: times for kind in kinds if (times := in_turns(manifest, kind))}
    found = found or {kind: times for kind in kinds if (times := one_by_one(manifest, kind))}
    if not found:
        return Answer("Faster?", "unknown", "Speed was not measured.")
    words = ", ".join(f"{kind} {times}" for kind, times in found.items()) + " of the dense model's speed."
    clear = {kind: times.ratio for kind, times in found.items() if times.clear}
    if len(clear) < len(found):
        noisy = " and ".join(kind for kind in found if kind not in clear)
        words += f" Runs of {noisy} differ more than the models: prunetune bench measures them in turns."
    if not clear:
        return Answer("Faster?", "unknown", words[:1].upper() + words[1:])
    faster = [kind in clear and clear[kind] > 1 for kind in found]
    return Answer("Faster?", "yes" if all(faster) else "partly" if any(faster) else "no", words[:1].upper() + words[1:])


def _as_good(run: RunFiles, headline: Headline | None, rows: Sequence[Row]) -> Answer:
    if headline is None:
        return Answer("As good?", "unknown", "There are no scores to compare.")
    judged = [row for row in rows if row.headline and row.verdict]
    worse = [row.task for row in judged if row.verdict == "worse"]
    name = reference_of(run.evaluations)
    reference, count = REFERENCE_NAMES[name], f"{len(judged)} task{'s' * (len(judged) != 1)}"
    if not judged:
        return Answer("As good?", "unknown", f"No task says so beyond doubt; {reference} is the reference.")
    if not worse and name != "tuned":  # that says that tuning helped, not that pruning did no harm
        return Answer("As good?", "unknown", "Not worse than the untuned model; a dense tuned one was not scored.")
    if not worse and (hidden := _hidden(judged)):
        return Answer("As good?", "unknown", hidden)
    if not worse:
        return Answer(
            "As good?", "yes", f"Not worse than the {reference} model, beyond two standard errors, in {count}."
        )
    named = ", ".join(text.shortened(task) for task in worse[:3])
    named += f" and {len(worse) - 3} more" if len(worse) > 3 else ""
    words = f"In {len(worse)} of {count} worse than the {reference} model beyond two standard errors: {named}."
    return Answer("As good?", "no" if len(worse) == len(judged) else "partly", words)


def _hidden(judged: Sequence[Row]) -> str:
    """The largest loss that noise could hide, where that is too much to call a model as good; else empty."""
    losses = [(1 - row.left[0] + 2 * row.left[1], row) for row in judged if row.verdict == "within noise"]
    known = [pair for pair in losses if not math.isnan(pair[0])]  # of a score of 0 there is no share
    loss, row = max(known, key=lambda pair: pair[0], default=(0.0, None))
    if row is None or not loss > HIDDEN:
        return ""
    items = f"{text.count(row.n)} item{'s' * (row.n != 1)}"
    return (
        f"Not worse beyond two standard errors, but these are wide: with {items}, up to "
        f"{text.share(min(1.0, loss))} of {text.shortened(row.task)} may be lost. Score more (evaluate.limit)."
    )


def _within(manifest: Mapping[str, Any]) -> Answer:
    failed = lookup(manifest, "failed")
    if isinstance(failed, str) and failed:
        return Answer("Within limits?", "no", f"{failed[:1].upper()}{failed[1:]}.")
    found = limits(manifest)
    if not found:
        return Answer("Within limits?", "none", "No gate was set.")
    outside = [limit for limit in found if not limit.held]
    if outside:
        return Answer("Within limits?", "no", f"{outside[0].gate}: {outside[0].found}, limit {outside[0].limit}.")
    acted = len(_acts(manifest))
    words = f"{'The gate' if len(found) == 1 else f'All {len(found)} gates'} held at the end"
    return Answer("Within limits?", "yes", words + (f", after acting {_times(acted)}." if acted else "."))


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def limits(manifest: Mapping[str, Any]) -> list[Limit]:
    """The gates of a run, and the margins that its gain had to reach."""
    listed = [one for part in ("gates", "gain") for one in _listed(manifest, part, "limits")]
    return [
        Limit(
            str(one.get("gate", "")),
            text.decimal(number(one, "limit")),
            text.decimal(number(one, "found")),
            one.get("held") is True,
        )
        for one in listed
        if isinstance(one, Mapping)
    ]


def uneven(manifest: Mapping[str, Any]) -> list[str]:
    """Widths that keep a model from the margin it missed; none where it reached it."""
    missed = any(isinstance(one, Mapping) and one.get("held") is False for one in _listed(manifest, "gain", "limits"))
    return [str(words) for words in _listed(manifest, "gain", "uneven")] if missed else []


def _listed(manifest: Mapping[str, Any], *path: str) -> list[Any]:
    found = lookup(manifest, *path)
    return found if isinstance(found, list) else []


def events(manifest: Mapping[str, Any]) -> list[Event]:
    """What gates did, in order; what was done again and again is one event."""
    made: list[Event] = []
    for one in _acts(manifest):
        event = Event((text.count(number(one, "step")),), str(one.get("did", "")), _joined(one.get("gates")))
        if made and (made[-1].did, made[-1].gates) == (event.did, event.gates):
            made[-1] = Event((*made[-1].steps, *event.steps), event.did, event.gates)
        else:
            made.append(event)
    return made


def _acts(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in _listed(manifest, "gates", "events") if isinstance(one, Mapping)]


def _joined(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def watched(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, of the dense model as the run began, of what the run ended with)."""
    dense, last = mapping(manifest, "validation", "dense"), mapping(manifest, "validation", "last")
    names = [str(name) for name in (*dense, *(name for name in last if name not in dense))] if dense else []
    return [(name, text.decimal(number(dense, name)), text.decimal(number(last, name))) for name in names]
