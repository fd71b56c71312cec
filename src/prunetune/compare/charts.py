"""The charts of a comparison: quality over size, a line for each method; with one size, a row for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from prunetune.compare.methods import DENSE
from prunetune.report import svg
from prunetune.report.figures import WIDTH
from prunetune.report.formatting import truncated
from prunetune.report.training_curves import ReportFigure
from prunetune.utils.json_lines import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("s", "^", "v", "P", "X", "<", ">", "d")
GLYPHS = dict(zip("s^vPX<>doD*", "■▲▼✚✖◀▶◆●◆★", strict=True))
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
LOG_AXIS_RATIO = 4.0  # perplexities, sizes and times that lie farther apart than this get a logarithmic axis


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn, the same in every chart."""

    colour: str
    marker: str
    line_style: Any = "-"
    is_reference: bool = False


FIXED_STYLES = {DENSE: MethodStyle(svg.DENSE, "D"), "untuned": MethodStyle(svg.MUTED, "*")}


def method_styles(methods: Sequence[str], reference: str) -> dict[str, MethodStyle]:
    """The reference stands out, the dense model is grey; the others differ in colour and marker, then in dashes."""
    styles, others = {}, 0
    for name in methods:
        if name == reference:
            styles[name] = MethodStyle(svg.PRUNED, "o", is_reference=True)
        elif name in FIXED_STYLES:
            styles[name] = FIXED_STYLES[name]
        else:
            cycle, colour = divmod(others, len(svg.SERIES))
            marker = MARKERS[(colour + 3 * cycle) % len(MARKERS)]  # the legend shows colour and marker, not dashes
            styles[name] = MethodStyle(svg.SERIES[colour], marker, DASHES[cycle % len(DASHES)])
            others += 1
    return styles


def legend(styles: Mapping[str, MethodStyle]) -> list[tuple[str, str, str]]:
    """The entries of the legend: (CSS colour, glyph of the marker, method)."""
    return [(svg.PAGE_COLOURS[style.colour], GLYPHS[style.marker], name) for name, style in styles.items()]


def draw_metric_chart(
    number: int, metric: str, label: str, rows: Sequence[JsonObject], styles: Mapping[str, MethodStyle]
) -> ReportFigure | None:
    """One metric over the share that is removed; None if no row has the metric."""
    scored = [row for row in rows if row["scores"].get(metric, {}).get("value") is not None]
    if not scored:
        return None
    several_sizes = len({row["keep"] for row in scored}) > 1
    draw = _draw_curves if several_sizes else _draw_dots
    markup = svg.render_svg(
        f"compare-{number}",
        f"{label} by share removed; the tables below have the numbers",
        WIDTH,
        3.0 if several_sizes else 0.7 + 0.24 * len(scored),
        lambda axes: draw(axes, metric, scored, styles),
    )
    better = "Higher is better" if metric.startswith(("acc", "rouge_l")) else "Lower is better"
    return ReportFigure(label, markup, note=f"{better}. Bars: one standard error over items.")


def draw_cost_charts(rows: Sequence[JsonObject], styles: Mapping[str, MethodStyle]) -> list[ReportFigure]:
    """Mean loss over the bytes of the weights, and over the time of a token: a chart for each runtime and device."""
    points: dict[tuple[str, str, str], list[tuple[float, JsonObject]]] = {}  # (title, axis, caption) -> (cost, row)
    for row in (row for row in rows if row["scores"].get("nll", {}).get("value") is not None):
        speed = row.get("speed") or {}
        if row.get("bytes"):
            size = ("Mean NLL by size of the weights", "weights, MB", "")
            points.setdefault(size, []).append((row["bytes"] / 1e6, row))
        if "token_s" in speed:
            title = f"Mean NLL by time a token in {speed['runtime'].split()[0]}"
            time = (title, "ms a token", f"Measured in turns in {speed['runtime']} on {speed['device']}. ")
            points.setdefault(time, []).append((speed["token_s"] * 1e3, row))
    charts = []
    for number, ((title, label, caption), costs) in enumerate(points.items()):
        draw = partial(_draw_costs, label=label, points=costs, styles=styles)
        spoken = f"{title}; the tables below have the numbers"
        markup = svg.render_svg(f"compare-cost-{number}", spoken, WIDTH, 3.0, draw)
        caption += "Lower and further left is better. Bars: one standard error over items."
        charts.append(ReportFigure(title, markup, note=caption))
    return charts


def _draw_costs(
    axes: Axes, label: str, points: Sequence[tuple[float, JsonObject]], styles: Mapping[str, MethodStyle]
) -> None:
    for name in dict.fromkeys(row["method"] for _, row in points):
        by_cost = {cost: row for cost, row in points if row["method"] == name}  # a dense one is in every size's rows
        style, costs = styles[name], sorted(by_cost)
        _draw_line(axes, costs, [by_cost[cost] for cost in costs], "nll", style)
    axes.set_xlabel(label)
    _set_log_scale(axes, [cost for cost, _ in points], vertical=False)


def _draw_line(
    axes: Axes, places: Sequence[float], rows: Sequence[JsonObject], metric: str, style: MethodStyle, **options: Any
) -> None:
    """A point with its standard error for each row, joined."""
    scores = [row["scores"][metric] for row in rows]
    axes.errorbar(
        places, [score["value"] for score in scores], yerr=[score["se"] or 0.0 for score in scores],
        color=style.colour, marker=style.marker, linestyle=style.line_style, elinewidth=0.8,
        markersize=6 if style.is_reference else 4.5, linewidth=2.4 if style.is_reference else 1.2, **options,
    )  # fmt: skip


def _draw_curves(axes: Axes, metric: str, rows: Sequence[JsonObject], styles: Mapping[str, MethodStyle]) -> None:
    """A line over sizes for each method; a dense method is a point and a level."""
    from matplotlib.ticker import PercentFormatter

    dense = {row["method"] for row in rows if math.isclose(row["kept"], 1.0) and row["keep"] < 1}
    for order, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted((row for row in rows if row["method"] == name), key=lambda row: -float(row["kept"]))
        style = styles[name]
        if name in dense:
            _draw_level(axes, points[0]["scores"][metric]["value"], style, horizontal=True)
            points = points[:1]
        zorder = 100 if style.is_reference else 3 + order / 100
        _draw_line(axes, [1 - row["kept"] for row in points], points, metric, style, zorder=zorder)
    axes.set_xlabel("share of the prunable parameters removed")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if metric.startswith("ppl "):
        _set_log_scale(axes, [row["scores"][metric]["value"] for row in rows], vertical=True)


def _draw_dots(axes: Axes, metric: str, rows: Sequence[JsonObject], styles: Mapping[str, MethodStyle]) -> None:
    """A row with a point for each method; the dense model and the reference are levels, too."""
    for position, row in enumerate(rows):
        value, error, style = row["scores"][metric]["value"], row["scores"][metric]["se"], styles[row["method"]]
        if row["method"] == DENSE or style.is_reference:
            _draw_level(axes, value, style, horizontal=False)
        axes.errorbar(
            value, position, xerr=error, fmt=style.marker, color=style.colour,
            markersize=7 if style.is_reference else 5.5, elinewidth=1.4,
        )  # fmt: skip
    names = [truncated(row["method"]) for row in rows]
    room = [name.rjust(round(1.7 * len(name)), "\u00a0") for name in names]  # text is larger on narrow pages
    axes.set_yticks(range(len(rows)), room, color=svg.INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=True, axis="both")
    if metric.startswith("ppl "):
        _set_log_scale(axes, [row["scores"][metric]["value"] for row in rows], vertical=False)


def _draw_level(axes: Axes, value: float, style: MethodStyle, *, horizontal: bool) -> None:
    draw = axes.axhline if horizontal else axes.axvline
    draw(value, color=style.colour, linewidth=0.9, linestyle=(0, (4, 3)))


def _set_log_scale(axes: Axes, values: Sequence[float], *, vertical: bool) -> None:
    """A logarithmic axis for values that lie far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(values) <= 0 or max(values) < LOG_AXIS_RATIO * min(values):
        return
    axis = axes.yaxis if vertical else axes.xaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log")
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
