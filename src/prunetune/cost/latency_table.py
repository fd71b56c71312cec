"""Seconds of a plan, from a table that was measured width by width on one device.

A layer takes `dense` seconds, plus what its attention and its MLP take less than in the dense layer; widths between
two measured ones are interpolated. Host and device are tracks of their own: each is a sum over layers, and a phase
takes the longer. A table is about one device, driver, set of versions and workload: its header.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.layer_shapes import ModelShape, UnitCounts
from prunetune.errors import ConfigError

FORMAT = "prunetune-latency-1"
PHASES = ("prefill", "decode")
TRACKS = tuple(f"{phase}.{part}" for phase in PHASES for part in ("host", "device"))
LatencyCurve = tuple[tuple[int, float], ...]  # (units, seconds beyond the dense layer's), ascending


@dataclass(frozen=True)
class LayerTiming:
    """One kind of layer on one track."""

    dense: float  # seconds of the dense layer
    attention: LatencyCurve
    mlp: LatencyCurve

    def scaled(self, factor: float) -> LayerTiming:
        """All of it times a factor."""
        attention, mlp = (
            tuple((units, factor * seconds) for units, seconds in curve) for curve in (self.attention, self.mlp)
        )
        return LayerTiming(factor * self.dense, attention, mlp)


@dataclass(frozen=True)
class LatencyTable:
    """What was measured, in seconds: {track: {layer that stands for those alike: Timed}}."""

    header: Mapping[str, Any]
    outside_layers: Mapping[str, float]  # track -> seconds outside the layers
    layers: Mapping[str, Mapping[int, LayerTiming]] = field(default_factory=dict)

    def scaled(self, factors: Mapping[str, float]) -> LatencyTable:
        """Every track times a factor of its own."""
        layers = {
            track: {index: timed.scaled(factors[track]) for index, timed in of.items()}
            for track, of in self.layers.items()
        }
        return replace(
            self,
            outside_layers={track: factors[track] * rest for track, rest in self.outside_layers.items()},
            layers=layers,
        )

    def to_json(self) -> str:
        """As text; `from_json` reads it back."""
        layers = {
            track: {str(index): asdict(timed) for index, timed in of.items()} for track, of in self.layers.items()
        }
        return json.dumps(
            {"format": FORMAT, "header": dict(self.header), "rest": dict(self.outside_layers), "layers": layers},
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, where: str) -> LatencyTable:
        """Read what `to_json` wrote; raises `ConfigError` on anything else."""
        try:
            data: Any = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, and this version reads {FORMAT}")
            layers = {
                track: {int(index): _timed(timed) for index, timed in data["layers"][track].items()} for track in TRACKS
            }
            return cls(dict(data["header"]), {track: float(data["rest"][track]) for track in TRACKS}, layers)
        except (ValueError, KeyError, TypeError, AttributeError) as broken:
            raise ConfigError(
                f"{where}: no latency table ({broken}); leave budget.table out, and one is measured"
            ) from broken

    @classmethod
    def load(cls, path: Path, header: Mapping[str, Any]) -> LatencyTable:
        """A file's table, if it is about what `header` says; raises `ConfigError` with the first difference."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as missing:
            raise ConfigError(
                f"budget.table {path}: cannot be read ({missing}); leave budget.table out, and one is measured"
            ) from missing
        table = cls.from_json(text, f"budget.table {path}")
        for name, wanted in header.items():
            found = table.header.get(name)
            if found != wanted:
                raise ConfigError(
                    f"budget.table {path} was measured with {name} {found!r}, and here it is {wanted!r}: "
                    "leave budget.table out, and one is measured here"
                )
        return table


def _timed(values: Mapping[str, Any]) -> LayerTiming:
    curves = {
        name: tuple((int(units), float(seconds)) for units, seconds in values[name]) for name in ("attention", "mlp")
    }
    if any(curve != tuple(sorted(curve)) for curve in curves.values()):
        raise ValueError("widths do not ascend")
    return LayerTiming(float(values["dense"]), **curves)


@dataclass(frozen=True)
class LatencyCost:
    """Seconds of some tracks, each so many times."""

    dense_shape: ModelShape
    table: LatencyTable
    tracks: tuple[tuple[str, float], ...]

    @property
    def fixed_cost(self) -> float:
        """Embeddings, head, and what the runtime takes by itself."""
        return sum(times * self.table.outside_layers[track] for track, times in self.tracks)

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Zero for a layer that left the stack."""
        part = self.dense_shape.layers[layer]
        own = {site.kind: counts[site.name] for site in part.sites}
        if not own.get("layers", 1):
            return 0.0
        groups = part.heads(counts)[0]
        channels = own.get("mlp") if own.get("mlp-blocks", 1) else 0
        found = 0.0
        for track, times in self.tracks:
            timed = self.table.layers[track][self._like[layer]]
            found += times * (timed.dense + interpolate(timed.attention, groups) + interpolate(timed.mlp, channels))
        return max(0.0, found)

    @cached_property
    def _like(self) -> Mapping[int, int]:
        return representative_layers(self.dense_shape)


def latency_costs(
    anatomy: ModelShape, workload: WorkloadConfig, table: LatencyTable, phase: str
) -> tuple[LatencyCost, ...]:
    """Sums whose largest is the seconds of a batch of requests ("mix"), of its "prefill", or of a "decode" step.

    A table without a host's track (all zero) has one sum.
    """
    phases = {"prefill": 1.0, "decode": workload.generate - 1.0} if phase == "mix" else {phase: 1.0}
    choices = []
    for name, times in phases.items():
        tracks = [track for track in TRACKS if track.startswith(name)]
        told = [track for track in tracks if track.endswith("device") or _is_measured(table, track)]
        choices.append([(track, times) for track in told])
    return tuple(LatencyCost(anatomy, table, tracks) for tracks in itertools.product(*choices))


def _is_measured(table: LatencyTable, track: str) -> bool:
    return bool(table.outside_layers[track]) or any(timed.dense for timed in table.layers[track].values())


def interpolate(curve: LatencyCurve, units: int | None) -> float:
    """Between the two widths beside it, or the end's own beyond the ends; None is the dense width."""
    if not curve:
        return 0.0
    if units is None or units >= curve[-1][0]:
        return curve[-1][1]
    place = bisect.bisect_left(curve, (units,))
    high = curve[place]
    if high[0] == units or place == 0:
        return high[1]
    low = curve[place - 1]
    return low[1] + (high[1] - low[1]) * (units - low[0]) / (high[0] - low[0])


def representative_layers(anatomy: ModelShape) -> dict[int, int]:
    """{layer: the first layer that has the same window and the same sites}."""
    first: dict[Any, int] = {}
    found = {}
    for index, layer in anatomy.layers.items():
        key = (layer.sliding_window, tuple((site.kind, site.units) for site in layer.sites if not site.is_whole_block))
        found[index] = first.setdefault(key, index)
    return found
