"""Models take turns, run by run: what slows the machine for a while slows all of them."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from prunetune.bench.runner import BenchSample, OutOfMemory, Runner, WorkEstimate


@dataclass(frozen=True)
class SummaryStats:
    """Median, quartiles and ends of `runs` values; in the values' own unit."""

    median: float
    low_quartile: float
    high_quartile: float
    min: float
    max: float
    runs: int


def summary_stats(values: Sequence[float]) -> SummaryStats:
    """Of at least one value; quartiles lie between the ends (the inclusive method), and one value is all five."""
    if len(values) == 1:
        low = middle = high = values[0]
    else:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return SummaryStats(middle, low, high, min(values), max(values), len(values))


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, run by run: what slows both runs of a round falls out. Raises `ValueError` on unequal lengths."""
    return [one / other for one, other in zip(above, below, strict=True) if other > 0]


log = logging.getLogger(__name__)


@dataclass
class BatchMeasurement:
    """One model at one batch size."""

    batch: int
    work: WorkEstimate = field(default_factory=WorkEstimate)
    samples: list[BenchSample] = field(default_factory=list)  # by round
    failed: str = ""  # why there are no samples


def run_interleaved(runners: Sequence[Runner], batches: Sequence[int], runs: int) -> list[list[BatchMeasurement]]:
    """What every runner does at every batch size: one list of batch sizes for each runner.

    Odd rounds go backwards, so that no model always follows the same one. A batch that does not fit ends that model's
    part in it, and nothing else.
    """
    found = [[BatchMeasurement(batch) for batch in batches] for _ in runners]
    for place, batch in enumerate(batches):
        log.info("batch %d: warm-up and %d rounds", batch, runs)
        pairs = [(runner, cells[place]) for runner, cells in zip(runners, found, strict=True)]
        for runner, cell in pairs:
            _warm(runner, cell)
        for turn in range(runs):
            for runner, cell in pairs if turn % 2 == 0 else reversed(pairs):
                _run(runner, cell)
    return found


def _warm(runner: Runner, cell: BatchMeasurement) -> None:
    try:
        cell.work = runner.warm_up(cell.batch)
    except OutOfMemory as failed:
        cell.failed = str(failed)


def _run(runner: Runner, cell: BatchMeasurement) -> None:
    if cell.failed:
        return
    try:
        cell.samples.append(runner.run(cell.batch))
    except OutOfMemory as failed:  # others hold more by now
        cell.failed, cell.samples = str(failed), []
