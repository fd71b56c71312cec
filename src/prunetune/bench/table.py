"""The result of `prunetune bench` as text for a terminal."""

from collections.abc import Callable, Iterator, Sequence

from prunetune.bench.interleaved import SummaryStats
from prunetune.bench.result import BenchCell, BenchedModel, BenchResult
from prunetune.utils.tables import table_lines

SHOWN: dict[str, tuple[str, float, int]] = {  # metric -> heading, factor to the unit shown, decimals
    "prefill": ("first token, ms", 1e3, 1),
    "decode": ("per step, ms", 1e3, 2),
    "throughput": ("tokens/s", 1, 1),
    "peak_memory": ("peak memory, MB", 1e-6, 0),
    "energy": ("J/token", 1, 3),
}
COUNTS = {"prefill": "FLOPs", "decode": "bytes"}
FACTS: dict[str, Callable[[BenchedModel], float]] = {
    "parameters, M": lambda model: model.facts.parameters / 1e6,
    "weights' file, MB": lambda model: model.facts.file_bytes / 1e6,
    "load (once), s": lambda model: model.facts.load_s,
}


def render_bench(bench: BenchResult) -> str:
    """Every metric as median (least to most), and how many times better than the first model it is."""
    options, ratio_heading = bench.options, "times better than [0]" if len(bench.models) > 1 else ""
    threads = f", {options.threads} threads" if options.threads else ""
    settings = f"prompt {options.prompt}, {options.generate} tokens written, {options.runs} interleaved runs{threads}"
    lines = [settings]
    for number, model in enumerate(bench.models):
        lines.append(f"[{number}] {model.name}: {model.facts.runtime}, {model.facts.dtype}, {model.facts.device}")
    lines += ["", *table_lines(("", "model", "", ratio_heading), _fact_rows(bench.models))]
    for cells in zip(*(model.cells for model in bench.models), strict=True):
        headings = (f"batch {cells[0].batch}", "model", "median (least to most)", ratio_heading)
        lines += ["", *table_lines(headings, _metric_rows(cells)), *(cell.failed for cell in cells if cell.failed)]
    return "\n".join(lines)


def _fact_rows(models: Sequence[BenchedModel]) -> Iterator[tuple[str, ...]]:
    """Rows of parameters, file size and loading time."""
    for heading, value in FACTS.items():
        for number, model in enumerate(models):
            own, first = value(model), value(models[0])
            ratio = f"x{first / own:.2f}" if number and own else ""
            yield heading if not number else "", f"[{number}]", f"{own:.2f}" if own else "unknown", ratio


def _metric_rows(cells: Sequence[BenchCell]) -> Iterator[tuple[str, ...]]:
    """Rows of the metrics that were measured for any model at one batch size."""
    for metric, (heading, factor, decimals) in SHOWN.items():
        if not any(metric in cell.figures for cell in cells):
            continue
        for number, cell in enumerate(cells):
            stats, ratio, counted = cell.figures.get(metric), cell.ratios.get(metric), cell.counted.get(metric)
            value = _median_and_range(stats, factor, decimals) if stats else "not measured"
            ratio_text = f"x{_median_and_range(ratio, 1, 2)}" if ratio else ""
            ratio_text += f"; by {COUNTS[metric]} x{counted:.2f}" if ratio and counted else ""
            yield heading if not number else "", f"[{number}]", value, ratio_text


def _median_and_range(stats: SummaryStats, factor: float, decimals: int) -> str:
    median, low, high = (f"{value * factor:.{decimals}f}" for value in (stats.median, stats.min, stats.max))
    return f"{median} ({low} to {high})"
