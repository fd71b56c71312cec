"""What stayed in each layer while the decision moved: steps to the right, layers downwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from prunetune.plan import Plan
from prunetune.report import svg
from prunetune.report.figures import WIDTH, draw_cells
from prunetune.report.kept_layers import parse_site_layer
from prunetune.report.run_folder import RunFiles, RunLogEntry, get_number
from prunetune.report.training_curves import ReportFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

LEVELS = 10  # shades
MOST_COLUMNS = 40
KINDS = {True: "KV groups", False: "MLP channels"}


@dataclass(frozen=True)
class HeatmapColumn:
    """One moment: the share kept in each layer."""

    step: int
    shares: Mapping[int, float]


def heatmap_figures(run: RunFiles) -> list[ReportFigure]:
    """One picture for attention and one for the MLP, where the log tells widths and there is a plan to end with."""
    if run.plan is None:
        return []
    made = []
    for is_attention, kind in KINDS.items():
        columns = heatmap_columns(run.metrics, run.plan, is_attention=is_attention)
        if len(columns) > 1 and columns[-1].shares:
            label = f"{kind} kept by layer over the search: {describe_columns(columns)}"
            note = "Each column is a moment of the search, the last one the plan; full colour: all of the layer stays."
            made.append(
                ReportFigure(f"{kind} by layer over time", _picture(f"heat-{kind[:2]}", label, columns), note=note)
            )
    return made


def heatmap_columns(metrics: Sequence[RunLogEntry], plan: Plan, *, is_attention: bool) -> list[HeatmapColumn]:
    """The moments that were logged, thinned, and the plan."""
    plain = [site for site in plan.units if ":" not in site]  # others are units inside these, see `layers`
    places = {site: at[0] for site in plain if (at := parse_site_layer(site)) is not None and at[1] == is_attention}
    moments = []
    for line in metrics:
        step, widths = get_number(line, "step"), line.get("widths")
        if step is not None and isinstance(widths, Mapping):
            counts = {site: get_number(widths, site) for site in places}
            shares = {places[site]: count / plan.units[site] for site, count in counts.items() if count is not None}
            moments.append(HeatmapColumn(int(step), shares))
    every = -(-len(moments) // MOST_COLUMNS) or 1
    ends = max((int(step) for line in metrics if (step := get_number(line, "step")) is not None), default=0)
    last = {layer: len(plan.kept[site]) / plan.units[site] for site, layer in places.items() if plan.units[site]}
    return [*moments[::every], HeatmapColumn(ends, last)] if moments else []


def describe_columns(columns: Sequence[HeatmapColumn]) -> str:
    """The course in words."""
    means = [sum(column.shares.values()) / max(1, len(column.shares)) for column in columns]
    return f"mean share {means[0]:.0%} at step {columns[0].step}, {means[-1]:.0%} in the plan; the table has each layer"


def _picture(name: str, label: str, columns: Sequence[HeatmapColumn]) -> Markup:
    layers = sorted({layer for column in columns for layer in column.shares})

    def draw(drawing: Drawing) -> None:
        axes = drawing.subplots()
        by_level: dict[int, list[tuple[int, int]]] = {}
        for place, column in enumerate(columns):
            for layer, share in column.shares.items():
                by_level.setdefault(round(min(1.0, max(0.0, share)) * LEVELS), []).append((place, layer))
        everything = [cell for level in by_level.values() for cell in level]
        draw_cells(axes, everything, svg.REMOVED)
        for level, members in sorted(by_level.items()):
            if level:
                draw_cells(axes, members, svg.PRUNED, alpha=level / LEVELS)
        axes.set_ylim(max(layers) + 0.5, min(layers) - 0.5)
        axes.set_xlim(-0.6, len(columns) - 0.4)
        axes.set_yticks(layers[:: 1 + len(layers) // 9])
        axes.set_ylabel("layer")
        axes.set_xlabel("step (last: the plan)")
        axes.grid(visible=False)
        shown = range(0, len(columns), max(1, len(columns) // 6))
        axes.set_xticks(list(shown), [str(columns[place].step) for place in shown])

    return svg.render_svg(name, label, WIDTH, max(2.0, 1.0 + 0.08 * len(layers)), draw)
