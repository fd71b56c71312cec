"""Latency tables: the seconds of a plan, from times measured width by width on one device.

A layer takes its dense seconds plus the (negative) differences of its attention and its MLP at their kept widths;
between two measured widths, times are interpolated. Host and device are separate tracks: each is a sum over layers, and
a phase takes the longer one. A table's header names the device, driver, versions and workload that it is valid for.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.layer_shapes import ModelShape, UnitCounts
from prunetune.errors import ConfigError
from prunetune.pruning.units import UnitKind
from prunetune.utils.untrusted import parse_json, read_text, short_repr, shorten

FORMAT = "prunetune-latency-1"
PHASES, PROCESSORS = ("prefill", "decode"), ("host", "device")
TRACKS = tuple(f"{phase}.{processor}" for phase in PHASES for processor in PROCESSORS)
REMEDY = "leave budget.table out, and one is measured"
LatencyCurve = tuple[tuple[int, float], ...]  # (units, seconds more than in the dense layer), units ascending


@dataclass(frozen=True)
class LayerTiming:
    """Times of one kind of layer on one track."""

    dense: float  # seconds of the dense layer
    attention: LatencyCurve
    mlp: LatencyCurve

    def scaled(self, factor: float) -> LayerTiming:
        """Every time multiplied by a factor."""
        curves = (self.attention, self.mlp)
        attention, mlp = (tuple((units, factor * seconds) for units, seconds in curve) for curve in curves)
        return LayerTiming(factor * self.dense, attention, mlp)


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds; layers with equal sites share the times of the first, see `representative_layers`."""

    header: Mapping[str, Any]
    outside_layers: Mapping[str, float]  # track -> seconds outside the layers
    layers: Mapping[str, Mapping[int, LayerTiming]] = field(default_factory=dict)  # track -> layer -> times

    def scaled(self, factors: Mapping[str, float]) -> LatencyTable:
        """Every track multiplied by a factor of its own."""
        outside_layers = {track: factors[track] * seconds for track, seconds in self.outside_layers.items()}
        layers = {
            track: {index: timing.scaled(factors[track]) for index, timing in timings.items()}
            for track, timings in self.layers.items()
        }
        return replace(self, outside_layers=outside_layers, layers=layers)

    def to_json(self) -> str:
        layers = {
            track: {str(index): asdict(timing) for index, timing in timings.items()}
            for track, timings in self.layers.items()
        }
        table = {"format": FORMAT, "header": dict(self.header), "rest": dict(self.outside_layers), "layers": layers}
        return json.dumps(table, indent=1)

    @property
    def impossible_time(self) -> str:
        """A time that is negative, not finite, or zero for a whole phase: "decode.device -0.01 s"; "" if there is none.

        A busy machine gives such times, since those of layers and widths are differences of measured ones.
        """
        for track in TRACKS:
            layers = self.layers[track].values()
            for seconds in (self.outside_layers[track], *(timing.dense for timing in layers)):
                if not 0 <= seconds < math.inf:
                    return f"{track} {seconds:.3g} s"
            differences = (seconds for timing in layers for _, seconds in (*timing.attention, *timing.mlp))
            if not all(map(math.isfinite, differences)):
                return f"{track} nan s"
        for phase in PHASES:
            tracks = [f"{phase}.{processor}" for processor in PROCESSORS]
            if not any(
                self.outside_layers[track] or any(t.dense for t in self.layers[track].values()) for track in tracks
            ):
                return f"{phase} 0 s"
        return ""

    @classmethod
    def from_json(cls, text: str, where: str, remedy: str = REMEDY) -> LatencyTable:
        """Read what `to_json` wrote; raises `ConfigError` on anything else, and on times that cannot be."""
        try:
            data: Any = parse_json(text, nan=True)
            if data["format"] != FORMAT:
                raise ValueError(f"format {short_repr(data['format'])}, and this version reads {FORMAT}")
            layers = {
                track: {int(index): _layer_timing(values) for index, values in data["layers"][track].items()}
                for track in TRACKS
            }
            table = cls(dict(data["header"]), {track: float(data["rest"][track]) for track in TRACKS}, layers)
            if table.impossible_time:
                raise ValueError(f"it says {table.impossible_time}, which cannot be")
            return table
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as broken:
            raise ConfigError(f"{where}: not a latency table ({shorten(str(broken))}); {remedy}") from broken

    @classmethod
    def load(cls, path: Path, header: Mapping[str, Any]) -> LatencyTable:
        """Read a table; raises `ConfigError` where its header differs from this one, with the first difference."""
        try:
            text = read_text(path)
        except (OSError, ValueError) as missing:
            raise ConfigError(f"budget.table {path}: cannot be read ({missing}); {REMEDY}") from missing
        table = cls.from_json(text, f"budget.table {path}")
        if difference := table.difference_from(header):
            raise ConfigError(f"budget.table {path} was measured with {difference}: {REMEDY} here")
        return table

    def difference_from(self, header: Mapping[str, Any]) -> str:
        """The first entry in which its header differs from this one, in words; "" where all are equal."""
        for name, expected in header.items():
            if (actual := self.header.get(name)) != expected:
                return f"{name} {short_repr(actual)}, and here it is {expected!r}"
        return ""


def _layer_timing(values: Mapping[str, Any]) -> LayerTiming:
    names = ("attention", "mlp")
    curves = {name: tuple((int(units), float(seconds)) for units, seconds in values[name]) for name in names}
    if any(curve != tuple(sorted(curve)) for curve in curves.values()):
        raise ValueError("widths do not ascend")
    return LayerTiming(float(values["dense"]), **curves)


@dataclass(frozen=True)
class LatencyCost:
    """Seconds of a plan: a weighted sum of tracks."""

    dense_shape: ModelShape
    table: LatencyTable
    tracks: tuple[tuple[str, float], ...]  # (track, times that it counts)

    def fixed_cost(self, counts: UnitCounts) -> float:
        """Seconds outside the layers: embeddings, head, and the runtime itself."""
        return sum(times * self.table.outside_layers[track] for track, times in self.tracks)

    def layer_cost(self, layer: int, counts: UnitCounts) -> float:
        """Seconds of a layer; zero if it is removed."""
        shape = self.dense_shape.layers[layer]
        by_kind = {site.kind: counts[site.name] for site in shape.sites}
        if not by_kind.get(UnitKind.LAYER, 1):
            return 0.0
        kv_heads = shape.heads(counts)[0]
        channels = by_kind.get(UnitKind.MLP_CHANNEL) if by_kind.get(UnitKind.MLP_BLOCK, 1) else 0
        seconds = 0.0
        for track, times in self.tracks:
            timing = self.table.layers[track][self._representative[layer]]
            attention, mlp = interpolate(timing.attention, kv_heads), interpolate(timing.mlp, channels)
            seconds += times * (timing.dense + attention + mlp)
        return max(0.0, seconds)

    @cached_property
    def _representative(self) -> Mapping[int, int]:
        return representative_layers(self.dense_shape)


def latency_costs(
    dense_shape: ModelShape, workload: WorkloadConfig, table: LatencyTable, phase: str
) -> tuple[LatencyCost, ...]:
    """Costs whose largest is the seconds of a batch of requests ("mix"), of its "prefill", or of one "decode" step.

    Each phase takes its host or its device track, whichever is longer, so there is a cost for every combination. A host
    track that was not measured (all zero) is left out.
    """
    phases = {"prefill": 1.0, "decode": workload.generate - 1.0} if phase == "mix" else {phase: 1.0}
    choices = []
    for name, times in phases.items():
        host, device = f"{name}.host", f"{name}.device"
        is_measured = table.outside_layers[host] or any(timing.dense for timing in table.layers[host].values())
        tracks = [host, device] if is_measured else [device]
        if not all(set(representative_layers(dense_shape).values()) <= table.layers[track].keys() for track in tracks):
            raise ConfigError(f"the latency table lacks a layer of this model; {REMEDY}")
        choices.append([(track, times) for track in tracks])
    return tuple(LatencyCost(dense_shape, table, tracks) for tracks in itertools.product(*choices))


def interpolate(curve: LatencyCurve, units: int | None) -> float:
    """Seconds at a width: linear between the two nearest measured ones, constant beyond the ends; None: dense width."""
    if not curve:
        return 0.0
    if units is None or units >= curve[-1][0]:
        return curve[-1][1]
    index = bisect.bisect_left(curve, (units,))
    high = curve[index]
    if high[0] == units or index == 0:
        return high[1]
    low = curve[index - 1]
    return low[1] + (high[1] - low[1]) * (units - low[0]) / (high[0] - low[0])


def representative_layers(dense_shape: ModelShape) -> dict[int, int]:
    """{layer: the first layer with the same window and the same sites}."""
    first: dict[Any, int] = {}
    representatives = {}
    for index, layer in dense_shape.layers.items():
        widths = tuple((site.kind, site.units) for site in layer.sites if not site.kind.is_whole_block)
        representatives[index] = first.setdefault((layer.sliding_window, widths), index)
    return representatives
