"""Inline SVG that follows the page: its text size, its fonts and its light and dark colours."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Matplotlib writes plain colours only. These nearly black ones stand for the page's own and are exchanged afterwards.
INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
DENSE, TUNED, PRUNED, REMOVED = "#010105", "#010106", "#010107", "#010108"
SEARCH, SETTLE, TUNE = "#010109", "#01010a", "#01010b"
SERIES = ("#010110", "#010111", "#010112", "#010113", "#010114", "#010115", "#010116", "#010117")  # of many methods
PAGE_COLOURS = {
    INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--line)", SURFACE: "var(--surface)",
    DENSE: "var(--dense)", TUNED: "var(--tuned)", PRUNED: "var(--pruned)", REMOVED: "var(--gone)",
    SEARCH: "var(--search)", SETTLE: "var(--settle)", TUNE: "var(--tune)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
}  # fmt: skip

STYLE: dict[str, Any] = {  # a figure of 5 inches is 340 px wide on a phone: its text is 11 px there
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.labelsize": 12,
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 12,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a task's name is a dollar
    "xtick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 12,
    "xtick.major.size": 3,
    "xtick.major.width": 0.6,
    "ytick.color": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 12,
    "ytick.major.size": 0,
}


def render_svg(name: str, label: str, width: float, height: float, draw: Callable[[Axes], None]) -> Markup:
    """Axes of that size (inches), filled by `draw`, as inline SVG; the same drawing gives the same bytes.

    `name` has to be unique on the page; screen readers read out the label.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with (
        matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": f"prunetune-{name}"}]),
        warnings.catch_warnings(),
    ):
        # Text is measured with matplotlib's font and shown in the reader's: matplotlib need not have every glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_inlined(buffer.getvalue(), str(escape(label))))  # noqa: S704  # matplotlib escapes what it is given


def _inlined(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([\d. ]+)"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    svg = re.sub(
        r"<svg[^>]*>", lambda _: f'<svg viewBox="{view_box[1]}" role="img" aria-label="{label}">', svg, count=1
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1: the same in every figure of the page
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    # The stand-ins become the page's own colours, which follow its light or dark mode.
    svg = re.sub(r"(?<=(?:fill|roke): )#0101[0-9a-f]{2}", lambda colour: PAGE_COLOURS.get(colour[0], colour[0]), svg)
    return re.sub(r"\n\s*", "\n", svg)
