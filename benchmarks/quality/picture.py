"""Draw the README's picture, docs/assets/results.svg, from files of results; `tests/test_figures.py` holds it to them.

python benchmarks/quality/picture.py
"""

from __future__ import annotations

from claims import RESULTS, ROOT
from merged import comparison_of

FILE = ROOT / "docs" / "assets" / "results.svg"
KEEPS = (0.6, 0.4)
LINES = {
    "progressive": "prunetune",
    "obs": "prune once, then tune (OBS)",
}  # method -> its name and style in the picture
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 250, 62, 74, 268  # of a panel; of its axes, in the panel
STYLE = """
svg { font: 13px system-ui, sans-serif; }
.page { fill: #fff; } text { fill: #1f2328; } .small { font-size: 12px; fill: #59636e; }
.grid { stroke: #d1d9e0; } .dense { stroke: #59636e; stroke-dasharray: 2 4; stroke-width: 2; }
.progressive, .obs { fill: none; stroke-width: 2.5; }
.progressive { stroke: #0969da; } .obs { stroke: #bc4c00; stroke-dasharray: 7 4; }
circle.progressive { fill: #0969da; } circle.obs { fill: #bc4c00; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; } text { fill: #e6edf3; } .small { fill: #9198a1; }
.grid { stroke: #3d444d; } .dense { stroke: #9198a1; } .progressive { stroke: #4493f8; } .obs { stroke: #f0883e; }
circle.progressive { fill: #4493f8; } circle.obs { fill: #f0883e; }
}
"""


def panel(domain: str, left: int) -> list[str]:
    """Loss over the share removed: a line for each method, and a level line at the loss of the dense model."""
    by_keep = {keep: comparison_of(RESULTS / f"{domain}.json", keep)["rows"] for keep in KEEPS}
    losses = {keep: {row["method"]: row["scores"]["nll"]["value"] for row in rows} for keep, rows in by_keep.items()}
    dense = losses[KEEPS[0]]["dense-equal-help"]
    low, high = dense - 0.03, max(losses[KEEPS[-1]][method] for method in LINES) + 0.03

    def at(removed: float, loss: float) -> tuple[float, float]:
        return left + LEFT + removed / 0.6 * (WIDTH - LEFT - 40), BOTTOM - (loss - low) / (high - low) * (BOTTOM - TOP)

    drawn = [f'<text x="{left + LEFT}" y="{TOP - 18}" font-weight="600">{domain}: loss by share removed</text>']
    for removed in (0, 0.4, 0.6):
        x, bottom = at(removed, low)
        drawn.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
        drawn.append(f'<text class="small" x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{removed:.0%}</text>')
    (start, level), (end, _) = at(0, dense), at(0.6, dense)
    drawn.append(f'<line class="dense" x1="{start:.1f}" y1="{level:.1f}" x2="{end:.1f}" y2="{level:.1f}"/>')
    drawn.append(f'<text class="small" x="{start - 8:.1f}" y="{level + 4:.1f}" text-anchor="end">{dense:.2f}</text>')
    for method in reversed(LINES):
        points = [at(0, dense), *(at(1 - keep, losses[keep][method]) for keep in KEEPS)]
        drawn.append(f'<polyline class="{method}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
        drawn += [f'<circle class="{method}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points[1:]]
        x, y = points[-1]
        drawn.append(f'<text class="small" x="{x + 8:.1f}" y="{y + 6:.1f}">{losses[KEEPS[-1]][method]:.2f}</text>')
    return drawn


def picture() -> str:
    """The whole SVG: a legend, and a panel for each domain; it follows the reader's light or dark scheme."""
    width, height = 2 * WIDTH, BOTTOM + 40
    title = "Loss of the pruned model by share removed, legal and healthcare, prunetune and pruning once"
    drawn = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">']
    drawn += [
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for left, (method, name) in zip((LEFT, LEFT + 130), LINES.items(), strict=True):
        drawn.append(f'<line class="{method}" x1="{left}" y1="22" x2="{left + 28}" y2="22"/>')
        drawn.append(f'<text x="{left + 36}" y="26">{name}</text>')
    drawn.append(f'<line class="dense" x1="{LEFT + 380}" y1="22" x2="{LEFT + 408}" y2="22"/>')
    drawn.append(f'<text x="{LEFT + 416}" y="26">dense, tuned with the same help</text>')
    return "\n".join([*drawn, *panel("legal", 0), *panel("healthcare", WIDTH), "</svg>"]) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(picture(), encoding="utf-8")
