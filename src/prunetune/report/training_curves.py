"""Training curves: the log of a run over its steps, with phases, cuts, captions and limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from prunetune.report import svg
from prunetune.report.cuts import cut_lines
from prunetune.report.figures import WIDTH, legend_entries, percent_axis
from prunetune.report.run_folder import RunFiles, get_number
from prunetune.utils.json_lines import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 300
PHASES = {
    "prune": (svg.SEARCH, "prune: the model tunes between cuts"),
    "search": (svg.SEARCH, "search: decisions move while adapters tune"),
    "settle": (svg.SETTLE, "settle: the decision is frozen, adapters of removed units empty"),
    "tune": (svg.TUNE, "tune: after the last cut"),
}
# Key in validation.jsonl: title, the metric that limits name, caption.
VALIDATION_METRICS = {
    "nll": ("Validation loss", "valid.nll", "NLL per token of the decided sub-network on the validation split"),
    "valid.accuracy": ("Validation accuracy", "valid.accuracy", "By likelihood, on rows of the validation split"),
    "guard.perplexity": ("Guard: perplexity", "guard.perplexity", "Of general texts that are never tuned on"),
    "guard.accuracy": ("Guard: accuracy", "guard.accuracy", "By likelihood, on general rows that are never tuned on"),
}


@dataclass(frozen=True)
class ReportFigure:
    """A picture with title, legend and caption."""

    title: str
    picture: Markup
    legend: Sequence[tuple[str, str]] = ()  # (CSS colour, words)
    note: str = ""


@dataclass(frozen=True)
class TrainingCurve:
    """A quantity over steps."""

    points: tuple[tuple[float, float], ...]  # (step, value), ascending
    colour: str
    smoothed: bool = False  # draw a running mean over the raw line
    markers: bool = False


@dataclass(frozen=True)
class PhaseSpan:
    """The steps of one phase."""

    phase: str
    first: float
    last: float


def phase_spans(metrics: Sequence[JsonObject]) -> list[PhaseSpan]:
    """The phases in the order they came, each up to where the next begins."""
    spans: list[PhaseSpan] = []
    for line in metrics:
        step, phase = get_number(line, "step"), line.get("phase")
        if step is None or not isinstance(phase, str):
            continue
        if spans:
            spans[-1] = PhaseSpan(spans[-1].phase, spans[-1].first, step)
        if not spans or spans[-1].phase != phase:
            spans.append(PhaseSpan(phase, step, step))
    return spans


def phase_legend(spans: Sequence[PhaseSpan]) -> list[tuple[str, str]]:
    """(CSS colour, words) for the phases that occurred."""
    phases = dict.fromkeys(span.phase for span in spans)
    return [(svg.PAGE_COLOURS[PHASES[phase][0]], PHASES[phase][1]) for phase in phases if phase in PHASES]


def training_curve(
    lines: Sequence[JsonObject], key: str, colour: str, *, smoothed: bool = False, markers: bool = False
) -> TrainingCurve | None:
    """One key of the log over steps, or None where no line has it."""
    points = ((get_number(line, "step"), get_number(line, key)) for line in lines)
    # A resumed run logs some steps twice: the later line is the one that counts.
    known = {step: value for step, value in points if step is not None and value is not None}
    return TrainingCurve(tuple(sorted(known.items())), colour, smoothed, markers) if known else None


def training_figures(run: RunFiles) -> list[ReportFigure]:
    """The figures that the log has data for."""
    log, target = run.metrics, run.manifest.limits.requested_keep  # of another budget, what it leaves of the parameters
    target = get_number(run.config, "budget", "keep") if target is None else target
    budget = run.config.get("budget")
    is_of_model = isinstance(budget, dict) and budget.get("of") == "model"
    counted = "all parameters" if is_of_model else "the prunable parameters"
    dashed = f"; the dashed line is the target, {target:.0%}." if target is not None else "."
    losses = {
        "tuning loss": training_curve(log, "loss", svg.TUNED, smoothed=True),
        "search loss": training_curve(log, "search_loss", svg.PRUNED, smoothed=True),
    }
    figures = [
        _curve_figure(
            run, "losses", "Losses", *losses.values(), note="Faint: as logged. Strong: running mean.",
            legend={curve.colour: name for name, curve in losses.items() if curve},
        ),
        _curve_figure(
            run, "kept", "Share kept against the target", training_curve(log, "kept", svg.PRUNED),
            kind="share", target=target,
            note=f"Share of {counted} that the current decision keeps{dashed}",
        ),
        _curve_figure(
            run, "changed", "Decisions changed", training_curve(log, "changed", svg.PRUNED), kind="share",
            note="Share of the units whose decision changed since the step before.",
        ),
    ]  # fmt: skip
    for key, (title, metric, caption) in VALIDATION_METRICS.items():
        limits = [limit.limit for limit in run.manifest.limits.limits if limit.condition.startswith(f"{metric} ")]
        limit = limits[0] if limits else None
        note = f"{caption}; the dashed line is the limit." if limit is not None else f"{caption}."
        curve = training_curve(run.validation, key, svg.TUNED, markers=True)
        name = f"validation-{key.replace('.', '-')}"
        figures.append(_curve_figure(run, name, title, curve, note=note, target=limit))
    figures += [
        _curve_figure(
            run, "rate", "Learning rate", training_curve(log, "lr", svg.DENSE), kind="rate",
            note="Of what is tuned: all weights, or the adapters.",
        ),
        _curve_figure(
            run, "speed", "Training speed", training_curve(log, "tokens_per_s", svg.DENSE),
            note="Tokens a second of the tuning steps.",
        ),
    ]  # fmt: skip
    return [figure for figure in figures if figure is not None]


def _curve_figure(
    run: RunFiles, name: str, title: str, *curves: TrainingCurve | None, note: str,
    legend: dict[str, str] | None = None, target: float | None = None,
    kind: Literal["plain", "share", "rate"] = "plain",
) -> ReportFigure | None:  # fmt: skip
    """Quantities over the steps of the run: phases shaded, a vertical line at each cut, a dashed one at the target."""
    present = [curve for curve in curves if curve is not None]
    if not present:
        return None

    def draw(axes: Axes) -> None:
        for span in phase_spans(run.metrics):
            axes.axvspan(span.first, span.last, color=PHASES.get(span.phase, (svg.GRID, ""))[0], linewidth=0)
        for line in cut_lines(run.metrics):
            axes.axvline(line["step"], color=svg.MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        for curve in present:
            _plot_curve(axes, curve)
        if target is not None:
            axes.axhline(target, color=svg.INK, linewidth=1, linestyle=(0, (4, 3)))
        if kind == "share":
            percent_axis(axes.yaxis)
        if kind == "rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
        if kind != "plain":
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.margins(x=0)

    ends = [(curve.points[0], curve.points[-1]) for curve in present]
    spoken = "; ".join(f"From {a[1]:.4g} at step {a[0]:.0f} to {b[1]:.4g} at step {b[0]:.0f}" for a, b in ends)
    picture = svg.render_svg(f"curve-{name}", f"{title} over steps. {spoken}.", WIDTH, 2.2, draw)
    return ReportFigure(title, picture, legend_entries(legend or {}), note)


def _plot_curve(axes: Axes, curve: TrainingCurve) -> None:
    points = downsample(curve.points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if curve.markers or len(points) == 1 else None
    if not curve.smoothed or len(points) < 15:
        axes.plot(steps, values, color=curve.colour, marker=marker, clip_on=marker is None)
        return
    axes.plot(steps, values, color=curve.colour, linewidth=0.8, alpha=0.4)
    axes.plot(steps, running_mean(values, len(values) // 15), color=curve.colour)


def downsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points: means of equal runs of neighbours."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(step for step, _ in chunk) / len(chunk), sum(value for _, value in chunk) / len(chunk)) for chunk in chunks
    ]


def running_mean(values: Sequence[float], neighbours: int) -> list[float]:
    """Mean over so many neighbours to either side, fewer at the ends."""
    windows = [values[max(0, centre - neighbours) : centre + neighbours + 1] for centre in range(len(values))]
    return [sum(window) / len(window) for window in windows]
