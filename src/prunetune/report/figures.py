"""The figures of the report, drawn with matplotlib: scores, recovery, kept units.

Sizes are in inches; all figures have one width, so that type has one size.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from prunetune.plan import Plan
from prunetune.report import svg
from prunetune.report.formatting import truncated
from prunetune.report.kept_layers import LayerKeptUnits, count_kept, kept_by_kind
from prunetune.report.scores import TaskMetricRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
WIDTH = 5.0
MAX_GROUPS = 32  # up to here every KV group is drawn
MODEL_MARKS = {"dense": (svg.DENSE, "o"), "tuned": (svg.TUNED, "s"), "pruned": (svg.PRUNED, "D")}


def scores_figure(label: str, rows: Sequence[TaskMetricRow]) -> Markup:
    """One metric over its tasks: a mark for each model, a bar of one standard error to either side."""

    def draw(axes: Axes) -> None:
        for position, row in enumerate(rows):
            for offset, (name, (colour, marker)) in zip((-0.22, 0.0, 0.22), MODEL_MARKS.items(), strict=True):
                score = row.scores.get(name)
                if score is not None and math.isfinite(score.value):
                    draw_mark(axes, score.value, position + offset, xerr=score.se, fmt=marker, color=colour)
        _task_axis(axes, [row.task for row in rows], 0.06)
        axes.set_xlabel(rows[0].label)

    return svg.render_svg(f"scores-{rows[0].metric}", label, WIDTH, 0.75 + 0.46 * len(rows), draw)


def recovery_figure(label: str, rows: Sequence[tuple[str, float, float]]) -> Markup:
    """Recovery by task from (task, share of the reference, its standard error); a dashed line at 100%."""

    def draw(axes: Axes) -> None:
        for position, (_, share, error) in enumerate(rows):
            draw_mark(axes, share, position, xerr=error)
        axes.axvline(1.0, color=svg.INK, linewidth=1, linestyle=(0, (4, 3)))
        _task_axis(axes, [task for task, _, _ in rows], 0.08)
        percent_axis(axes.xaxis)
        axes.set_xlabel("of the reference's score")

    return svg.render_svg("recovery", label, WIDTH, 0.8 + 0.3 * len(rows), draw)


def draw_mark(axes: Axes, x: float, y: float, *, fmt: str = "D", color: str = svg.PRUNED, **error: float) -> None:
    """A mark with a bar of its error `xerr` or `yerr`, if that is finite."""
    finite: Any = {name: value for name, value in error.items() if math.isfinite(value)}
    axes.errorbar(x, y, **finite, fmt=fmt, color=color, markersize=5.5, elinewidth=1.6)


def _task_axis(axes: Axes, tasks: Sequence[str], margin: float) -> None:
    axes.set_yticks(range(len(tasks)), [truncated(task) for task in tasks], color=svg.INK)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.grid(visible=True, axis="both")
    axes.margins(x=margin)


def groups_figure(label: str, attention: Mapping[int, LayerKeptUnits], layers: Sequence[int]) -> Markup:
    """KV groups by layer: a cell for each, filled where it is kept; bars of the share where there are too many."""
    max_groups = max(groups.units for groups in attention.values())
    if max_groups > MAX_GROUPS:
        return unit_share_figure("groups", label, attention)

    def draw(axes: Axes) -> None:
        cells = {(index, unit) for index, groups in attention.items() for unit in range(groups.units)}
        kept = {(index, unit) for index, groups in attention.items() for unit in groups.kept}
        draw_cells(axes, sorted(kept), svg.PRUNED)
        draw_cells(axes, sorted(cells - kept), svg.REMOVED)
        axes.set_ylim(max_groups - 0.5, -0.5)
        axes.set_yticks(range(0, max_groups, 1 + max_groups // 9))
        axes.set_ylabel("KV group")
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        _layer_axis(axes, layers)

    return svg.render_svg("groups", label, WIDTH, max(1.9, 1.0 + 0.22 * min(max_groups, 12)), draw)


def draw_cells(axes: Axes, cells: Sequence[tuple[int, int]], colour: str, alpha: float | None = None) -> None:
    """Squares at (x, y), all of one colour."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    half_x, half_y = 0.40, 0.42
    corners = ((-half_x, -half_y), (half_x, -half_y), (half_x, half_y), (-half_x, half_y), (-half_x, -half_y))
    squares = [Path([(x + dx, y + dy) for dx, dy in corners], closed=True) for x, y in cells]
    if squares:
        axes.add_patch(PathPatch(Path.make_compound_path(*squares), facecolor=colour, linewidth=0, alpha=alpha))


def unit_share_figure(name: str, label: str, kept: Mapping[int, LayerKeptUnits]) -> Markup:
    """Share of the units of one kind that is kept, by layer."""
    colours = svg.PRUNED, svg.REMOVED
    return svg.render_svg(name, label, WIDTH, 1.9, lambda axes: _draw_shares(axes, kept, *colours))


def _draw_shares(axes: Axes, kept: Mapping[int, LayerKeptUnits], kept_colour: str, removed_colour: str) -> None:
    indices = sorted(kept)
    axes.bar(indices, [1.0] * len(indices), color=removed_colour, width=0.8)
    axes.bar(indices, [kept[index].share for index in indices], color=kept_colour, width=0.8)
    axes.set_ylim(0, 1)
    percent_axis(axes.yaxis)
    axes.grid(visible=False)
    _layer_axis(axes, indices)


def kept_units_png(plan: Plan) -> bytes:
    """A PNG picture for model cards: the share of each kind of unit that is kept, by layer, one chart above another.

    The same plan gives the same bytes. Empty for a plan whose sites name no layers.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    charts = {kind: by_layer for kind, by_layer in kept_by_kind(plan).items() if by_layer}
    buffer = io.BytesIO()
    if charts:
        with style.context(["default", {"axes.spines.top": False, "axes.spines.right": False}]):
            figure = Figure(figsize=(7, 1.9 * len(charts)), layout="constrained")
            all_axes = figure.subplots(len(charts), squeeze=False)[:, 0]
            for axes, (kind, by_layer) in zip(all_axes, charts.items(), strict=True):
                _draw_shares(axes, by_layer, "#c14a00", "#e4e8eb")
                kept, units = count_kept(by_layer.values())
                axes.set_title(f"{kind.replace('-', ' ')} kept: {kept:,} of {units:,}", fontsize=10, loc="left")
            figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _layer_axis(axes: Axes, indices: Sequence[int]) -> None:
    first, last = min(indices), max(indices)
    axes.set_xlim(first - 0.6, last + 0.6)
    axes.set_xticks(range(first, last + 1, 1 + (last - first) // 8))
    axes.set_xlabel("layer")


def percent_axis(axis: Axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def legend_entries(names: Mapping[str, str]) -> list[tuple[str, str]]:
    """(CSS colour, words) for a legend in HTML, from sentinel colours to words."""
    return [(svg.PAGE_COLOURS[colour], words) for colour, words in names.items()]
