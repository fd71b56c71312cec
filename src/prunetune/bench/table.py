"""The result of `prunetune bench` as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunetune.bench.interleaved import SummaryStats
from prunetune.bench.result import BenchCell, BenchedModel, BenchResult

SHOWN: dict[str, tuple[str, float, int]] = {  # metric -> heading, factor to the unit shown, decimals
    "prefill": ("first token, ms", 1e3, 1),
    "decode": ("per step, ms", 1e3, 2),
    "throughput": ("tokens/s", 1, 1),
    "peak_memory": ("peak memory, MB", 1e-6, 0),
    "energy": ("J/token", 1, 3),
}
COUNTS = {"prefill": "FLOPs", "decode": "bytes"}


def render_bench(bench: BenchResult) -> str:
    """Every metric as median (least to most), and how many times better than the first model it is."""
    options = bench.options
    threads = "" if not options.threads else f", {options.threads} threads"
    lines = [
        f"prompt {options.prompt}, {options.generate} tokens written, {options.runs} interleaved runs{threads}; "
        "median (least to most)"
    ]
    for number, model in enumerate(bench.models):
        lines.append(f"[{number}] {model.name}: {model.facts.runtime}, {model.facts.dtype}, {model.facts.device}")
    lines += ["", *_model_rows(bench)]
    for index, cell in enumerate(bench.models[0].cells):
        lines += ["", f"batch {cell.batch}", *_batch_rows(bench, index)]
    if len(bench.models) > 1:
        lines += ["", "x: times better than [0]; above 1 is smaller or faster"]
    return "\n".join(lines)


def _model_rows(bench: BenchResult) -> Iterator[str]:
    """Rows of parameters, file size and loading time."""
    rows: dict[str, Callable[[BenchedModel], float]] = {
        "parameters, M": lambda model: model.facts.parameters / 1e6,
        "weights' file, MB": lambda model: model.facts.file_bytes / 1e6,
        "load (once), s": lambda model: model.facts.load_s,
    }
    for heading, value in rows.items():
        first = value(bench.models[0])
        for number, model in enumerate(bench.models):
            own = value(model)
            ratio = f"x{first / own:.2f}" if number and own else ""
            yield _row(heading if not number else "", number, f"{own:.2f}" if own else "unknown", ratio)


def _batch_rows(bench: BenchResult, batch_index: int) -> Iterator[str]:
    """Rows of the measured metrics at one batch size, then why a model has none."""
    cells = [model.cells[batch_index] for model in bench.models]
    for metric, (heading, factor, decimals) in SHOWN.items():
        if not any(metric in cell.figures for cell in cells):
            continue
        for number, cell in enumerate(cells):
            stats = cell.figures.get(metric)
            text = _median_and_range(stats, factor, decimals) if stats else "not measured"
            yield _row(heading if not number else "", number, text, _ratio(cell, metric))
    yield from (cell.failed for cell in cells if cell.failed)


def _ratio(cell: BenchCell, metric: str) -> str:
    """The ratio to the first model as measured and, where it is known, by count."""
    if metric not in cell.ratios:
        return ""
    counted = f"; by {COUNTS[metric]} x{cell.counted[metric]:.2f}" if metric in cell.counted else ""
    return f"x{_median_and_range(cell.ratios[metric], 1, 2)}{counted}"


def _row(heading: str, number: int, value: str, ratio: str) -> str:
    return f"  {heading:<20} [{number}] {value:<30} {ratio}".rstrip()


def _median_and_range(stats: SummaryStats, factor: float, decimals: int) -> str:
    median, low, high = (f"{value * factor:.{decimals}f}" for value in (stats.median, stats.min, stats.max))
    return f"{median} ({low} to {high})"
