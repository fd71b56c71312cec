"""The pictures of a comparison: quality over size, a line for each method; a row for each where there is one size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from prunetune.compare.methods import DENSE
from prunetune.report import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_WIDTH = 5.0  # inches
MARKERS = ("s", "^", "v", "P", "X", "<", ">", "d")
GLYPHS = dict(zip("s^vPX<>doD*", "■▲▼✚✖◀▶◆●◆★", strict=True))
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
LOG_AXIS_RATIO = 4.0  # perplexities that lie farther apart than this get a logarithmic axis

ComparisonRow = Mapping[str, Any]  # of comparison.json


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn, in every picture the same."""

    colour: str
    marker: str
    line_style: Any = "-"
    is_reference: bool = False


FIXED_STYLES = {DENSE: MethodStyle(svg.DENSE, "D"), "untuned": MethodStyle(svg.MUTED, "*")}


@dataclass(frozen=True)
class ComparisonChart:
    """A figure with its words."""

    title: str
    svg_markup: Markup
    caption: str


def method_styles(methods: Sequence[str], reference: str) -> dict[str, MethodStyle]:
    """The reference stands out, the dense model is grey; the others differ in colour and mark, then in dashes."""
    looks, others = {}, 0
    for name in methods:
        if name == reference:
            looks[name] = MethodStyle(svg.PRUNED, "o", is_reference=True)
        elif name in FIXED_STYLES:
            looks[name] = FIXED_STYLES[name]
        else:
            turn, place = divmod(others, len(svg.SERIES))
            mark = MARKERS[(place + 3 * turn) % len(MARKERS)]  # the legend shows colour and mark, not dashes
            looks[name] = MethodStyle(svg.SERIES[place], mark, DASHES[turn % len(DASHES)])
            others += 1
    return looks


def legend(looks: Mapping[str, MethodStyle]) -> list[tuple[str, str, str]]:
    """(CSS colour, mark, method)"""
    return [(svg.PAGE_COLOURS[look.colour], GLYPHS[look.marker], name) for name, look in looks.items()]


def draw_metric_chart(
    number: int, metric: str, label: str, rows: Sequence[ComparisonRow], styles: Mapping[str, MethodStyle]
) -> ComparisonChart | None:
    """One metric over the share that is removed; None where nothing has it."""
    known = [row for row in rows if row["scores"].get(metric, {}).get("value") is not None]
    if not known:
        return None
    better = "Higher is better" if metric in ("acc", "rouge_l") else "Lower is better"
    spoken = f"{label} by share removed; the numbers stand in the tables below"
    name = f"compare-{number}"
    if len({row["keep"] for row in known}) > 1:
        drawn = svg.render_svg(
            name, spoken, FIGURE_WIDTH, 3.0, lambda figure: _draw_curves(figure, metric, known, styles)
        )
    else:
        height = 0.7 + 0.24 * len(known)
        drawn = svg.render_svg(
            name, spoken, FIGURE_WIDTH, height, lambda figure: _draw_dots(figure, metric, known, styles)
        )
    return ComparisonChart(label, drawn, f"{better}. Bars: one standard error over items.")


def _score(row: ComparisonRow, metric: str) -> tuple[float, float | None]:
    score = row["scores"][metric]
    return score["value"], score["se"]


def _draw_curves(figure: Figure, metric: str, rows: Sequence[ComparisonRow], looks: Mapping[str, MethodStyle]) -> None:
    axes = figure.subplots()
    flat = {row["method"] for row in rows if math.isclose(row["kept"], 1.0) and row["keep"] < 1}
    for order, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: -float(row["kept"]))
        if name in flat:
            _draw_level(axes, _score(own[0], metric)[0], looks[name], horizontal=True)
            own = own[:1]
        _draw_line(axes, metric, own, looks[name], order)
    axes.set_xlabel("share of the prunable parameters removed")
    _percent(axes)
    _set_log_scale(axes, metric, rows, vertical=True)


def _draw_line(axes: Axes, metric: str, rows: Sequence[ComparisonRow], look: MethodStyle, order: int) -> None:
    values, errors = zip(*(_score(row, metric) for row in rows), strict=True)
    axes.errorbar(
        [1 - row["kept"] for row in rows], values, yerr=[error or 0.0 for error in errors],
        color=look.colour, marker=look.marker, linestyle=look.line_style, markersize=6 if look.is_reference else 4.5,
        linewidth=2.4 if look.is_reference else 1.2, elinewidth=0.8, zorder=100 if look.is_reference else 3 + order / 100,
    )  # fmt: skip


def _draw_dots(figure: Figure, metric: str, rows: Sequence[ComparisonRow], looks: Mapping[str, MethodStyle]) -> None:
    axes = figure.subplots()
    for position, row in enumerate(rows):
        value, error = _score(row, metric)
        look = looks[row["method"]]
        if row["method"] == DENSE or look.is_reference:
            _draw_level(axes, value, look, horizontal=False)
        axes.errorbar(
            value, position, xerr=error, fmt=look.marker, color=look.colour,
            markersize=7 if look.is_reference else 5.5, elinewidth=1.4,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [_short(row["method"]) for row in rows], color=svg.INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=True, axis="both")
    _set_log_scale(axes, metric, rows, vertical=False)


def _draw_level(axes: Axes, value: float, look: MethodStyle, *, horizontal: bool) -> None:
    draw = axes.axhline if horizontal else axes.axvline
    draw(value, color=look.colour, linewidth=0.9, linestyle=(0, (4, 3)))


def _set_log_scale(axes: Axes, metric: str, rows: Sequence[ComparisonRow], *, vertical: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = [_score(row, metric)[0] for row in rows]
    if not metric.startswith("ppl ") or min(values) <= 0 or max(values) < LOG_AXIS_RATIO * min(values):
        return
    axis = axes.yaxis if vertical else axes.xaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log")
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _short(name: str) -> str:
    return name if len(name) <= 22 else f"{name[:21]}…"
