"""How the run went: its log as curves, phases and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from prunetune.report import svg
from prunetune.report.figures import PhaseSpan, TrainingCurve, legend_entries, training_curve_figure
from prunetune.report.run_folder import RunFiles, RunLogEntry, get_number, lookup

RATE = "Of the adapters; of all weights once these are tuned."


@dataclass(frozen=True)
class ReportFigure:
    """A picture with its words."""

    title: str
    picture: Markup
    legend: Sequence[tuple[str, str]] = ()  # (CSS colour, words)
    note: str = ""


def phase_spans(metrics: Sequence[RunLogEntry]) -> list[PhaseSpan]:
    """The phases in the order they came, each up to where the next begins."""
    spans: list[PhaseSpan] = []
    for line in metrics:
        step, phase = get_number(line, "step"), line.get("phase")
        if step is None or not isinstance(phase, str):
            continue
        if spans and spans[-1].phase == phase:
            spans[-1] = PhaseSpan(phase, spans[-1].first, step)
        else:
            if spans:
                spans[-1] = PhaseSpan(spans[-1].phase, spans[-1].first, step)
            spans.append(PhaseSpan(phase, step, step))
    return spans


def training_curve(
    lines: Sequence[RunLogEntry], key: str, colour: str, *, smoothed: bool = False, markers: bool = False
) -> TrainingCurve | None:
    """One key of the log over steps, or None where no line has it."""
    points = ((get_number(line, "step"), get_number(line, key)) for line in lines)
    # A resumed run logs some steps twice: the later line is the one that counts.
    known = {step: value for step, value in points if step is not None and value is not None}
    return TrainingCurve(tuple(sorted(known.items())), colour, smoothed, markers) if known else None


def training_figures(run: RunFiles) -> list[ReportFigure]:
    """The pictures that the log has data for."""
    asked = get_number(run.manifest, "gates", "keep_asked")  # of another budget, what it leaves of the parameters
    target = get_number(run.config, "budget", "keep") if asked is None else asked
    log = run.metrics
    made = [
        _losses(run),
        _curve_figure(
            run, "kept", "Share kept against the target", [training_curve(log, "kept", svg.PRUNED)], kind="share", target=target,
            note="Share of the prunable parameters that the current decision keeps"
            + (f"; the dashed line is the target, {target:.0%}." if target is not None else "."),
        ),
        _curve_figure(
            run, "changed", "Decisions changed", [training_curve(log, "changed", svg.PRUNED)], kind="share",
            note="Share of the units whose fate changed since the line before.",
        ),
        *_validations(run),
        _curve_figure(run, "rate", "Learning rate", [training_curve(log, "lr", svg.DENSE)], kind="rate", note=RATE),
        _curve_figure(
            run, "speed", "Training speed", [training_curve(log, "tokens_per_s", svg.DENSE)],
            note="Tokens a second of the tuning steps.",
        ),
    ]  # fmt: skip
    return [figure for figure in made if figure is not None]


VALIDATION_METRICS = {
    "nll": ("Validation loss", "valid.nll", "NLL per token of the decided sub-network on the validation split"),
    "valid.accuracy": ("Validation accuracy", "valid.accuracy", "By likelihood, on rows of the validation split"),
    "guard.perplexity": ("Guard: perplexity", "guard.perplexity", "Of general texts that are never tuned on"),
    "guard.accuracy": ("Guard: accuracy", "guard.accuracy", "By likelihood, on general rows that are never tuned on"),
}


def _validations(run: RunFiles) -> list[ReportFigure | None]:
    """Each metric that validations scored; the dashed line is the limit of a gate on it."""
    made: list[ReportFigure | None] = []
    for key, (title, metric, words) in VALIDATION_METRICS.items():
        limit = _limit(run, metric)
        note = f"{words}; the dashed line is the limit of a gate." if limit is not None else f"{words}."
        line = training_curve(run.validation, key, svg.TUNED, markers=True)
        name = f"validation-{key.replace('.', '-')}"
        made.append(_curve_figure(run, name, title, [line], note=note, target=limit))
    return made


def _limit(run: RunFiles, metric: str) -> float | None:
    listed = lookup(run.manifest, "gates", "limits")
    found = (
        [one for one in listed if str(lookup(one, "gate")).startswith(f"{metric} ")] if isinstance(listed, list) else []
    )
    return get_number(found[0], "limit") if found else None


def _losses(run: RunFiles) -> ReportFigure | None:
    tuning = training_curve(run.metrics, "loss", svg.TUNED, smoothed=True)
    search = training_curve(run.metrics, "search_loss", svg.PRUNED, smoothed=True)
    words = {svg.TUNED: "tuning loss"} if tuning else {}
    if search:
        words[svg.PRUNED] = "search loss"
    return _curve_figure(
        run, "losses", "Losses", [tuning, search], words=words, note="Faint: as logged. Strong: running mean."
    )


def _curve_figure(
    run: RunFiles, name: str, title: str, curves: Sequence[TrainingCurve | None], *, note: str,
    words: dict[str, str] | None = None, target: float | None = None, kind: Literal["plain", "share", "rate"] = "plain",
) -> ReportFigure | None:  # fmt: skip
    present = [each for each in curves if each is not None]
    if not present:
        return None
    label = f"{title} over steps. {'; '.join(_describe_curve(each) for each in present)}."
    picture = training_curve_figure(
        f"course-{name}", label, present, phase_spans(run.metrics), target=target, kind=kind
    )
    return ReportFigure(title, picture, legend_entries(words or {}), note)


def _describe_curve(line: TrainingCurve) -> str:
    (first, start), (last, end) = line.points[0], line.points[-1]
    return f"From {start:.4g} at step {first:.0f} to {end:.4g} at step {last:.0f}"


def phase_legend(spans: Sequence[PhaseSpan]) -> list[tuple[str, str]]:
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
