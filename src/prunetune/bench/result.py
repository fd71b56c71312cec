"""What `prunetune bench` found: figures with their spread, and ratios to the first model, run by run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunetune.bench.interleaved import BatchMeasurement, SummaryStats, paired_ratios, summary_stats
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner import BenchSample, ModelFacts, WorkEstimate


@dataclass(frozen=True)
class BenchMetric:
    """One thing that is measured in every run."""

    name: str
    unit: str
    compute: Callable[[BenchSample, int, int], float | None]  # sample, batch, tokens written by one sequence
    higher_is_better: bool = False


METRICS = (
    BenchMetric("prefill", "s", lambda sample, batch, wrote: sample.prefill_s),
    BenchMetric("decode", "s/step", lambda sample, batch, wrote: sample.decode_s),
    BenchMetric(
        "throughput", "tokens/s", lambda sample, batch, wrote: batch * wrote / sample.total_s, higher_is_better=True
    ),
    BenchMetric("peak_memory", "bytes", lambda sample, batch, wrote: sample.peak_bytes),
    BenchMetric("energy", "J/token", lambda s, batch, wrote: None if s.joules is None else s.joules / (batch * wrote)),
)


@dataclass(frozen=True)
class BenchCell:
    """One model at one batch size. Ratios say how many times better than the first model it is; the first has none."""

    batch: int
    figures: Mapping[str, SummaryStats]
    ratios: Mapping[str, SummaryStats]
    counted: Mapping[str, float]  # the ratios of prefill and decode that FLOPs and bytes promise
    samples: tuple[BenchSample, ...] = ()  # by round
    failed: str = ""


@dataclass(frozen=True)
class BenchedModel:
    """One model."""

    name: str
    facts: ModelFacts
    cells: tuple[BenchCell, ...]


@dataclass(frozen=True)
class BenchResult:
    """All models, the first being what the others are compared with."""

    options: BenchOptions
    versions: Mapping[str, str]
    models: tuple[BenchedModel, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        units = {figure.name: figure.unit for figure in METRICS}
        return {"reference": self.models[0].name, "units": units, **asdict(self)}


def summarise_bench(
    names: Sequence[str],
    facts: Sequence[ModelFacts],
    measured: Sequence[Sequence[BatchMeasurement]],
    *,
    options: BenchOptions,
    versions: Mapping[str, str],
) -> BenchResult:
    """The samples as figures and ratios."""
    models = [
        BenchedModel(
            name, known, tuple(_cell(*pair, wrote=options.generate) for pair in zip(cells, measured[0], strict=True))
        )
        for name, known, cells in zip(names, facts, measured, strict=True)
    ]
    return BenchResult(options, versions, tuple(models))


def _cell(mine: BatchMeasurement, first: BatchMeasurement, *, wrote: int) -> BenchCell:
    values = {figure: _values(figure, mine, wrote) for figure in METRICS}
    figures = {figure.name: summary_stats(found) for figure, found in values.items() if found}
    if mine is first:
        return BenchCell(mine.batch, figures, {}, {}, tuple(mine.samples), mine.failed)
    ratios: dict[str, SummaryStats] = {}
    for figure, found in values.items():
        theirs = _values(figure, first, wrote)
        if found and theirs:
            pair = (found, theirs) if figure.higher_is_better else (theirs, found)
            ratios[figure.name] = summary_stats(paired_ratios(*pair))
    return BenchCell(
        mine.batch, figures, ratios, _theoretical_ratios(mine.work, first.work), tuple(mine.samples), mine.failed
    )


def _values(figure: BenchMetric, cell: BatchMeasurement, wrote: int) -> list[float]:
    """Of every run; empty where one of them has none."""
    found = [figure.compute(sample, cell.batch, wrote) for sample in cell.samples]
    known = [value for value in found if value is not None and value > 0]
    return known if len(known) == len(found) else []


def _theoretical_ratios(mine: WorkEstimate, first: WorkEstimate) -> dict[str, float]:
    pairs = {
        "prefill": (first.prefill_flops, mine.prefill_flops),
        "decode": (first.decode_bytes, mine.decode_bytes),
    }
    return {name: dense / pruned for name, (dense, pruned) in pairs.items() if dense and pruned}
