"""The result of `prunetune bench`: every metric with its spread, and its ratio to the first model, run by run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunetune.bench.interleaved import BatchMeasurement, SummaryStats, paired_ratios, summary_stats
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner_protocol import BenchSample, ModelFacts


@dataclass(frozen=True)
class BenchMetric:
    """A metric that is computed from every timed run."""

    name: str
    unit: str
    compute: Callable[[BenchSample, int, int], float | None]  # of sample, batch, tokens written per sequence
    higher_is_better: bool = False


METRICS = (
    BenchMetric("prefill", "s", lambda sample, batch, tokens: sample.prefill_s),
    BenchMetric("decode", "s/step", lambda sample, batch, tokens: sample.decode_s),
    BenchMetric("throughput", "tokens/s", lambda s, batch, tokens: batch * tokens / s.total_s, higher_is_better=True),
    BenchMetric("peak_memory", "bytes", lambda sample, batch, tokens: sample.peak_bytes),
    BenchMetric("energy", "J/token", lambda s, batch, tokens: s.joules and s.joules / (batch * tokens)),
)


@dataclass(frozen=True)
class BenchCell:
    """One model at one batch size. Ratios are how many times better than the first model it is; the first has none."""

    batch: int
    figures: Mapping[str, SummaryStats]  # by name of the metric
    ratios: Mapping[str, SummaryStats]
    counted: Mapping[str, float]  # ratios of prefill FLOPs and decode bytes, by count
    samples: tuple[BenchSample, ...] = ()  # by round
    failed: str = ""  # why there are no samples


@dataclass(frozen=True)
class BenchedModel:
    """One model at every batch size."""

    name: str
    facts: ModelFacts
    cells: tuple[BenchCell, ...]


@dataclass(frozen=True)
class BenchResult:
    """All models; the others are compared with the first."""

    options: BenchOptions
    versions: Mapping[str, str]
    models: tuple[BenchedModel, ...]

    def to_dict(self) -> dict[str, Any]:
        units = {metric.name: metric.unit for metric in METRICS}
        return {"reference": self.models[0].name, "units": units, **asdict(self)}


def summarise_bench(
    names: Sequence[str],
    facts: Sequence[ModelFacts],
    measured: Sequence[Sequence[BatchMeasurement]],
    *,
    options: BenchOptions,
    versions: Mapping[str, str],
) -> BenchResult:
    """Compute metrics and ratios from the samples of each model at each batch size."""
    models = []
    for name, model_facts, batches in zip(names, facts, measured, strict=True):
        pairs = zip(batches, measured[0], strict=True)
        cells = tuple(_cell(own, first, options.generate) for own, first in pairs)
        models.append(BenchedModel(name, model_facts, cells))
    return BenchResult(options, versions, tuple(models))


def _cell(own: BatchMeasurement, first: BatchMeasurement, tokens: int) -> BenchCell:
    """Metrics of one model and batch size, and its ratios to the first model; `tokens` are written per sequence."""
    values = {metric: _values(metric, own, tokens) for metric in METRICS}
    figures = {metric.name: summary_stats(own_values) for metric, own_values in values.items() if own_values}
    ratios: dict[str, SummaryStats] = {}
    counted: dict[str, float] = {}
    if own is not first:
        for metric, own_values in values.items():
            first_values = _values(metric, first, tokens)
            if own_values and first_values:
                pair = (own_values, first_values) if metric.higher_is_better else (first_values, own_values)
                ratios[metric.name] = summary_stats(paired_ratios(*pair))
        if first.work.prefill_flops and own.work.prefill_flops:
            counted["prefill"] = first.work.prefill_flops / own.work.prefill_flops
        if first.work.decode_bytes and own.work.decode_bytes:
            counted["decode"] = first.work.decode_bytes / own.work.decode_bytes
    return BenchCell(own.batch, figures, ratios, counted, tuple(own.samples), own.failed)


def _values(metric: BenchMetric, measurement: BatchMeasurement, tokens: int) -> list[float]:
    """The metric of every run; empty if one of them has none."""
    values = [metric.compute(sample, measurement.batch, tokens) for sample in measurement.samples]
    positive = [value for value in values if value is not None and value > 0]
    return positive if len(positive) == len(values) else []
