"""What `prunetune bench` found: figures with their spread, and ratios to the first model, run by run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunetune.bench.interleaved import Measured, Spread, paired_ratios, spread
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner import Facts, Sample, Work


@dataclass(frozen=True)
class Figure:
    """One thing that is measured in every run."""

    name: str
    unit: str
    of: Callable[[Sample, int, int], float | None]  # sample, batch, tokens written by one sequence
    more_is_better: bool = False


FIGURES = (
    Figure("prefill", "s", lambda sample, batch, wrote: sample.prefill_s),
    Figure("decode", "s/step", lambda sample, batch, wrote: sample.decode_s),
    Figure("throughput", "tokens/s", lambda sample, batch, wrote: batch * wrote / sample.total_s, more_is_better=True),
    Figure("peak_memory", "bytes", lambda sample, batch, wrote: sample.peak_bytes),
    Figure("energy", "J/token", lambda s, batch, wrote: None if s.joules is None else s.joules / (batch * wrote)),
)


@dataclass(frozen=True)
class Cell:
    """One model at one batch size. Ratios say how many times better than the first model it is; the first has none."""

    batch: int
    figures: Mapping[str, Spread]
    ratios: Mapping[str, Spread]
    counted: Mapping[str, float]  # the ratios of prefill and decode that FLOPs and bytes promise
    samples: tuple[Sample, ...] = ()  # by round
    failed: str = ""


@dataclass(frozen=True)
class Benched:
    """One model."""

    name: str
    facts: Facts
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Bench:
    """All models, the first being what the others are compared with."""

    options: BenchOptions
    versions: Mapping[str, str]
    models: tuple[Benched, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        units = {figure.name: figure.unit for figure in FIGURES}
        return {"reference": self.models[0].name, "units": units, **asdict(self)}


def summarised(
    names: Sequence[str],
    facts: Sequence[Facts],
    measured: Sequence[Sequence[Measured]],
    *,
    options: BenchOptions,
    versions: Mapping[str, str],
) -> Bench:
    """The samples as figures and ratios."""
    models = [
        Benched(
            name, known, tuple(_cell(*pair, wrote=options.generate) for pair in zip(cells, measured[0], strict=True))
        )
        for name, known, cells in zip(names, facts, measured, strict=True)
    ]
    return Bench(options, versions, tuple(models))


def _cell(mine: Measured, first: Measured, *, wrote: int) -> Cell:
    values = {figure: _values(figure, mine, wrote) for figure in FIGURES}
    figures = {figure.name: spread(found) for figure, found in values.items() if found}
    if mine is first:
        return Cell(mine.batch, figures, {}, {}, tuple(mine.samples), mine.failed)
    ratios: dict[str, Spread] = {}
    for figure, found in values.items():
        theirs = _values(figure, first, wrote)
        if found and theirs:
            pair = (found, theirs) if figure.more_is_better else (theirs, found)
            ratios[figure.name] = spread(paired_ratios(*pair))
    return Cell(mine.batch, figures, ratios, _counted(mine.work, first.work), tuple(mine.samples), mine.failed)


def _values(figure: Figure, cell: Measured, wrote: int) -> list[float]:
    """Of every run; empty where one of them has none."""
    found = [figure.of(sample, cell.batch, wrote) for sample in cell.samples]
    known = [value for value in found if value is not None and value > 0]
    return known if len(known) == len(found) else []


def _counted(mine: Work, first: Work) -> dict[str, float]:
    pairs = {
        "prefill": (first.prefill_flops, mine.prefill_flops),
        "decode": (first.decode_bytes, mine.decode_bytes),
    }
    return {name: dense / pruned for name, (dense, pruned) in pairs.items() if dense and pruned}
