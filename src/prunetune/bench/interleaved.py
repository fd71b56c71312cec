"""Interleaved timing: models take turns, run by run, so that a slow moment of the machine slows all of them."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from prunetune.bench.runner_protocol import BenchSample, OutOfMemory, Runner, WorkEstimate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SummaryStats:
    """Median, quartiles, smallest and largest of several values, in their unit."""

    median: float
    low_quartile: float
    high_quartile: float
    min: float
    max: float
    runs: int  # number of values


def summary_stats(values: Sequence[float]) -> SummaryStats:
    """Summary of one or more values; quartiles by the inclusive method."""
    if len(values) == 1:
        low = median = high = values[0]
    else:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return SummaryStats(median, low, high, min(values), max(values), len(values))


def paired_ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, run by run, so that what slows both runs of a round cancels out.

    Raises `ValueError` on unequal lengths.
    """
    return [numerator / denominator for numerator, denominator in zip(above, below, strict=True) if denominator > 0]


@dataclass
class BatchMeasurement:
    """Samples of one model at one batch size."""

    batch: int
    work: WorkEstimate = field(default_factory=WorkEstimate)
    samples: list[BenchSample] = field(default_factory=list)  # one for each round
    failed: str = ""  # why there are no samples


def run_interleaved(runners: Sequence[Runner], batches: Sequence[int], runs: int) -> list[list[BatchMeasurement]]:
    """Time every runner at every batch size: for each runner, one measurement for each batch size.

    Odd rounds go backwards, so that no model always follows the same one. If a batch does not fit, that model has no
    samples of it; the others are timed.
    """
    measurements = [[BatchMeasurement(batch) for batch in batches] for _ in runners]
    for index, batch in enumerate(batches):
        log.info("batch %d: warm-up and %d rounds", batch, runs)
        pairs = [(runner, own[index]) for runner, own in zip(runners, measurements, strict=True)]
        for runner, measurement in pairs:
            try:
                measurement.work = runner.warm_up(batch)
            except OutOfMemory as failed:
                measurement.failed = str(failed)
        for round_number in range(runs):
            for runner, measurement in pairs if round_number % 2 == 0 else reversed(pairs):
                if measurement.failed:
                    continue
                try:
                    measurement.samples.append(runner.run(batch))
                except OutOfMemory as failed:  # other models may use more memory than at the warm-up
                    measurement.failed, measurement.samples = str(failed), []
    return measurements
