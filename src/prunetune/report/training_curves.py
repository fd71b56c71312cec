"""How the run went: its log as curves, phases and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from prunetune.report import svg
from prunetune.report.figures import Curve, Span, course_figure, legend
from prunetune.report.run_folder import Line, RunFiles, lookup, number

RATE = "Of the adapters; of all weights once these are tuned."


@dataclass(frozen=True)
class Figure:
    """A picture with its words."""

    title: str
    picture: Markup
    legend: Sequence[tuple[str, str]] = ()  # (CSS colour, words)
    note: str = ""


def spans_of(metrics: Sequence[Line]) -> list[Span]:
    """The phases in the order they came, each up to where the next begins."""
    spans: list[Span] = []
    for line in metrics:
        step, phase = number(line, "step"), line.get("phase")
        if step is None or not isinstance(phase, str):
            continue
        if spans and spans[-1].phase == phase:
            spans[-1] = Span(phase, spans[-1].first, step)
        else:
            if spans:
                spans[-1] = Span(spans[-1].phase, spans[-1].first, step)
            spans.append(Span(phase, step, step))
    return spans


def curve(lines: Sequence[Line], key: str, colour: str, *, noisy: bool = False, marked: bool = False) -> Curve | None:
    """One key of the log over steps, or None where no line has it."""
    points = ((number(line, "step"), number(line, key)) for line in lines)
    # A resumed run logs some steps twice: the later line is the one that counts.
    known = {step: value for step, value in points if step is not None and value is not None}
    return Curve(tuple(sorted(known.items())), colour, noisy, marked) if known else None


def figures(run: RunFiles) -> list[Figure]:
    """The pictures that the log has data for."""
    asked = number(run.manifest, "gates", "keep_asked")  # of another budget, what it leaves of the parameters
    target = number(run.config, "budget", "keep") if asked is None else asked
    log = run.metrics
    made = [
        _losses(run),
        _figure(
            run, "kept", "Share kept against the target", [curve(log, "kept", svg.PRUNED)], kind="share", target=target,
            note="Share of the prunable parameters that the current decision keeps"
            + (f"; the dashed line is the target, {target:.0%}." if target is not None else "."),
        ),
        _figure(
            run, "changed", "Decisions changed", [curve(log, "changed", svg.PRUNED)], kind="share",
            note="Share of the units whose fate changed since the line before.",
        ),
        *_validations(run),
        _figure(run, "rate", "Learning rate", [curve(log, "lr", svg.DENSE)], kind="rate", note=RATE),
        _figure(
            run, "speed", "Training speed", [curve(log, "tokens_per_s", svg.DENSE)],
            note="Tokens a second of the tuning steps.",
        ),
    ]  # fmt: skip
    return [figure for figure in made if figure is not None]


WATCHED = {
    "nll": ("Validation loss", "valid.nll", "NLL per token of the decided sub-network on the validation split"),
    "valid.accuracy": ("Validation accuracy", "valid.accuracy", "By likelihood, on rows of the validation split"),
    "guard.perplexity": ("Guard: perplexity", "guard.perplexity", "Of general texts that are never tuned on"),
    "guard.accuracy": ("Guard: accuracy", "guard.accuracy", "By likelihood, on general rows that are never tuned on"),
}


def _validations(run: RunFiles) -> list[Figure | None]:
    """Each metric that validations scored; the dashed line is the limit of a gate on it."""
    made: list[Figure | None] = []
    for key, (title, metric, words) in WATCHED.items():
        limit = _limit(run, metric)
        note = f"{words}; the dashed line is the limit of a gate." if limit is not None else f"{words}."
        line = curve(run.validation, key, svg.TUNED, marked=True)
        name = f"validation-{key.replace('.', '-')}"
        made.append(_figure(run, name, title, [line], note=note, target=limit))
    return made


def _limit(run: RunFiles, metric: str) -> float | None:
    listed = lookup(run.manifest, "gates", "limits")
    found = (
        [one for one in listed if str(lookup(one, "gate")).startswith(f"{metric} ")] if isinstance(listed, list) else []
    )
    return number(found[0], "limit") if found else None


def _losses(run: RunFiles) -> Figure | None:
    tuning = curve(run.metrics, "loss", svg.TUNED, noisy=True)
    search = curve(run.metrics, "search_loss", svg.PRUNED, noisy=True)
    words = {svg.TUNED: "tuning loss"} if tuning else {}
    if search:
        words[svg.PRUNED] = "search loss"
    return _figure(
        run, "losses", "Losses", [tuning, search], words=words, note="Faint: as logged. Strong: running mean."
    )


def _figure(
    run: RunFiles, name: str, title: str, curves: Sequence[Curve | None], *, note: str,
    words: dict[str, str] | None = None, target: float | None = None, kind: Literal["plain", "share", "rate"] = "plain",
) -> Figure | None:  # fmt: skip
    present = [each for each in curves if each is not None]
    if not present:
        return None
    label = f"{title} over steps. {'; '.join(_spoken(each) for each in present)}."
    picture = course_figure(f"course-{name}", label, present, spans_of(run.metrics), target=target, kind=kind)
    return Figure(title, picture, legend(words or {}), note)


def _spoken(line: Curve) -> str:
    (first, start), (last, end) = line.points[0], line.points[-1]
    return f"From {start:.4g} at step {first:.0f} to {end:.4g} at step {last:.0f}"


def phase_legend(spans: Sequence[Span]) -> list[tuple[str, str]]:
    """(CSS colour, words) for the phases that occurred."""
    words: dict[str, Any] = {
        "search": (svg.SEARCH, "search: decisions move while adapters tune"),
        "settle": (svg.SETTLE, "settle: the decision is frozen, adapters of removed units empty"),
        "tune": (svg.TUNE, "tune: the cut model"),
    }
    return [
        (svg.PAGE_COLOURS[words[phase][0]], words[phase][1])
        for phase in dict.fromkeys(span.phase for span in spans)
        if phase in words
    ]
