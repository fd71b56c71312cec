"""A bench as lines for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunetune.bench.interleaved import SummaryStats
from prunetune.bench.result import BenchCell, BenchedModel, BenchResult

SHOWN: dict[str, tuple[str, float, int]] = {  # figure -> heading, what its unit is multiplied by, decimals
    "prefill": ("first token, ms", 1e3, 1),
    "decode": ("per step, ms", 1e3, 2),
    "throughput": ("tokens/s", 1, 1),
    "peak_memory": ("peak memory, MB", 1e-6, 0),
    "energy": ("J/token", 1, 3),
}
COUNTS = {"prefill": "FLOPs", "decode": "bytes"}


def render_bench(bench: BenchResult) -> str:
    """Every figure as median (least to most), and how many times better than the first model."""
    options = bench.options
    threads = "" if not options.threads else f", {options.threads} threads"
    lines = [
        f"prompt {options.prompt}, {options.generate} tokens written, {options.runs} interleaved runs{threads}; "
        "median (least to most)"
    ]
    for number, model in enumerate(bench.models):
        known = model.facts
        lines.append(f"[{number}] {model.name}: {known.runtime}, {known.dtype}, {known.device}")
    lines += ["", *_model_rows(bench)]
    for place in range(len(bench.models[0].cells)):
        lines += ["", f"batch {bench.models[0].cells[place].batch}", *_batch_rows(bench, place)]
    if len(bench.models) > 1:
        lines += ["", "x: times better than [0]; above 1 is smaller or faster"]
    return "\n".join(lines)


def _model_rows(bench: BenchResult) -> Iterator[str]:
    """What does not change from run to run."""
    rows: dict[str, Callable[[BenchedModel], float]] = {
        "parameters, M": lambda model: model.facts.parameters / 1e6,
        "weights' file, MB": lambda model: model.facts.file_bytes / 1e6,
        "load (once), s": lambda model: model.facts.load_s,
    }
    for heading, value in rows.items():
        first = value(bench.models[0])
        for number, model in enumerate(bench.models):
            mine = value(model)
            ratio = f"x{first / mine:.2f}" if number and mine else ""
            shown = f"{mine:.2f}" if mine else "unknown"
            yield _row(heading if not number else "", number, shown, ratio)


def _batch_rows(bench: BenchResult, batch_index: int) -> Iterator[str]:
    cells = [model.cells[batch_index] for model in bench.models]
    for figure, (heading, times, decimals) in SHOWN.items():
        if not any(figure in cell.figures for cell in cells):
            continue
        for number, cell in enumerate(cells):
            found = cell.figures.get(figure)
            shown = _spread(found, times, decimals) if found else "not measured"
            yield _row(heading if not number else "", number, shown, _ratio(cell, figure))
    yield from (cell.failed for cell in cells if cell.failed)


def _ratio(cell: BenchCell, figure: str) -> str:
    if figure not in cell.ratios:
        return ""
    counted = f"; by {COUNTS[figure]} x{cell.counted[figure]:.2f}" if figure in cell.counted else ""
    return f"x{_spread(cell.ratios[figure], 1, 2)}{counted}"


def _row(heading: str, number: int, shown: str, ratio: str) -> str:
    return f"  {heading:<20} [{number}] {shown:<30} {ratio}".rstrip()


def _spread(found: SummaryStats, times: float, decimals: int) -> str:
    middle, least, most = (f"{value * times:.{decimals}f}" for value in (found.median, found.min, found.max))
    return f"{middle} ({least} to {most})"
