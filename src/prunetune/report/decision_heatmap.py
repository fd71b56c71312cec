"""Heat map of the decisions: the share kept in each layer (downwards) after each cut (to the right).

Of a run with a generator it also shows what the generator proposed at each logged step of the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from prunetune.plan import Plan
from prunetune.report import svg
from prunetune.report.figures import WIDTH, draw_cells
from prunetune.report.kept_layers import CHANNELS, GROUPS, parse_site
from prunetune.report.run_folder import RunFiles, get_number
from prunetune.report.training_curves import ReportFigure
from prunetune.utils.json_lines import JsonObject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = 10
MAX_COLUMNS = 40


@dataclass(frozen=True)
class HeatmapColumn:
    """The share kept in each layer at one step."""

    step: int
    shares: Mapping[int, float]


def heatmap_figures(run: RunFiles) -> list[ReportFigure]:
    """One figure for attention and one for the MLP, where the log has widths and there is a plan to end with."""
    if run.plan is None:
        return []
    searched = any(line.get("phase") == "search" for line in run.metrics)
    what = "a step of the search, the last one the plan" if searched else "the model after a cut, the first one dense"
    note = f"Each column is {what}. Full colour: the whole layer is kept."
    figures = []
    for kind in (GROUPS, CHANNELS):
        columns = heatmap_columns(run.metrics, run.plan, kind)
        if len(columns) > 1 and columns[-1].shares:
            ends = [sum(column.shares.values()) / max(1, len(column.shares)) for column in (columns[0], columns[-1])]
            means = f"mean share {ends[0]:.0%} at step {columns[0].step}, {ends[1]:.0%} in the plan"
            label = f"{kind} kept by layer over time: {means}; the table has each layer"
            picture = _draw_heatmap(f"heatmap-{kind[:2]}", label, columns)
            figures.append(ReportFigure(f"{kind} by layer over time", picture, note=note))
    return figures


def heatmap_columns(metrics: Sequence[JsonObject], plan: Plan, kind: str) -> list[HeatmapColumn]:
    """The dense model, at most `MAX_COLUMNS` of the steps whose widths are logged, and the plan if it came later."""
    layers = {site: parsed[0] for site in plan.units if (parsed := parse_site(site)) and parsed[1] == kind}
    columns = []
    for line in metrics:
        step, widths = get_number(line, "step"), line.get("widths")
        if step is not None and isinstance(widths, Mapping):
            counts = {site: get_number(widths, site) for site in layers}
            shares = {layers[site]: count / plan.units[site] for site, count in counts.items() if count is not None}
            columns.append(HeatmapColumn(int(step), shares))
    if not columns:
        return []
    stride = -(-len(columns) // MAX_COLUMNS)
    last_step = max((int(step) for line in metrics if (step := get_number(line, "step")) is not None), default=0)
    kept = {layer: len(plan.kept[site]) / plan.units[site] for site, layer in layers.items() if plan.units[site]}
    dense = [HeatmapColumn(0, dict.fromkeys(kept, 1.0))]
    last = [HeatmapColumn(last_step, kept)] if columns[-1].shares != kept else []
    return [*dense, *columns[::stride], *(last or columns[-1:] * ((len(columns) - 1) % stride > 0))]


def _draw_heatmap(name: str, label: str, columns: Sequence[HeatmapColumn]) -> Markup:
    layers = sorted({layer for column in columns for layer in column.shares})

    def draw(axes: Axes) -> None:
        cells_by_shade: dict[int, list[tuple[int, int]]] = {}
        for x, column in enumerate(columns):
            for layer, share in column.shares.items():
                cells_by_shade.setdefault(round(min(1.0, max(0.0, share)) * SHADES), []).append((x, layer))
        draw_cells(axes, [cell for cells in cells_by_shade.values() for cell in cells], svg.REMOVED)
        for shade, cells in sorted(cells_by_shade.items()):
            if shade:
                draw_cells(axes, cells, svg.PRUNED, alpha=shade / SHADES)
        axes.set_ylim(max(layers) + 0.5, min(layers) - 0.5)
        axes.set_xlim(-0.6, len(columns) - 0.4)
        axes.set_yticks(layers[:: 1 + len(layers) // 9])
        axes.set_ylabel("layer")
        axes.set_xlabel("step (0: dense)")
        axes.grid(visible=False)
        ticks = range(0, len(columns), max(1, len(columns) // 6))
        axes.set_xticks(list(ticks), [str(columns[x].step) for x in ticks])

    return svg.render_svg(name, label, WIDTH, max(2.0, 1.0 + 0.08 * len(layers)), draw)
