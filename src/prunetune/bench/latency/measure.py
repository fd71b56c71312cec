"""Measure a latency table from short models that differ in one width.

With n layers of a width, one dense layer in front and everything else equal, the width's seconds are the difference to
the dense short model over n; the two take turns, so that a clock that drifts is both's. What is outside the layers
follows from a short model twice as deep. Then the dense model's whole request is timed as `prunetune bench` does, and
the track that binds is scaled to it: a device that is busy for long runs slower than in short bursts.

Where a request takes long on a CPU, as on one that has no fast bfloat16, it is timed fewer times, then at fewer widths,
so that a table takes minutes and no hour.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prunetune.bench.latency.request_timing import RUNS, time_requests, time_tracks
from prunetune.bench.latency.short_models import build_short_model, narrow_layers, short_model_depth
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.latency_table import PHASES, TRACKS, LatencyCurve, LatencyTable, LayerTiming, representative_layers
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.model.loading import DTYPES, is_emulated
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site

log = logging.getLogger(__name__)
POINTS = 32  # most widths of an MLP
NOISY = 0.1
LONGEST = 180.0  # seconds that all widths may take together, as far as runs and widths can be fewer:
FEW, SPARSE = 3, 8  # first so many runs, then so many widths of an MLP, then one run
Seconds = Mapping[str, float]  # by track, or by phase
Timer = Callable[[Sequence[Any], WorkloadConfig, int], Sequence[Seconds]]
Curves = Mapping[str, Mapping[str, LatencyCurve]]  # by track and kind


@dataclass(frozen=True)
class LatencyTableBuilder:
    """One model's table in the making."""

    config: Any
    workload: WorkloadConfig
    device: torch.device
    align: int
    points: int = POINTS
    runs: int = RUNS
    includes_zero_width: bool = False  # a width of zero channels, too
    tracks: Timer = time_tracks
    seconds: Timer = time_requests
    clock: Callable[[], float] = time.monotonic

    def measure(self, header: Mapping[str, Any]) -> LatencyTable:
        """Everything, which takes about a second a width on a GPU."""
        dense = self._dense_shape()
        like = representative_layers(dense)
        count = short_model_depth(self._layer_bytes(dense), self.device)
        rests: list[Seconds] = []
        layers: dict[str, dict[int, LayerTiming]] = {track: {} for track in TRACKS}
        kinds = sorted(set(like.values()))
        for layer in kinds:
            log.info("measuring latency: layers like %d, %d at a time", layer, count + 1)
            short, deep, curves = self._measure_layer_kind(dense, layer, count, LONGEST / len(kinds))
            rests.append({track: 2 * short[track] - deep[track] for track in TRACKS})
            for track in TRACKS:
                each = (deep[track] - short[track]) / (count + 1)
                layers[track][layer] = LayerTiming(each, **curves[track])
        rest = {track: statistics.median(rest[track] for rest in rests) for track in TRACKS}
        return self._scaled(LatencyTable(dict(header), rest, layers), list(like.values()))

    def _dense_shape(self) -> ModelShape:
        model = build_short_model(
            self.config, range(self.config.num_hidden_layers), self.workload, torch.device("meta")
        )
        return model_shape(model, find_sites(model))

    def _layer_bytes(self, anatomy: ModelShape) -> float:
        counts = anatomy.dense_counts()
        return 2.0 * sum(layer.params(counts) for layer in anatomy.layers.values()) / len(anatomy.layers)

    def _measure_layer_kind(
        self, anatomy: ModelShape, layer: int, count: int, allowed: float
    ) -> tuple[Seconds, Seconds, Curves]:
        """Seconds of a dense short model and of one twice as deep; of every width beyond dense, for each layer."""
        model = build_short_model(self.config, [layer] * (count + 1), self.workload, self.device)
        sites = anatomy.layers[layer].sites
        paced = self._within_time_limit(model, sites, allowed)
        twice = build_short_model(self.config, [layer] * 2 * (count + 1), self.workload, self.device)
        short, deep = self.tracks([model, twice], self.workload, paced.runs)
        del twice
        bases = [short]
        found: dict[str, dict[str, list[tuple[int, float]]]] = {
            track: {site.kind: [(site.units, 0.0)] for site in sites} for track in TRACKS
        }
        for site in sites:
            for units in paced.widths(site.kind, site.units):
                small = narrow_layers(model, site.kind, units, remove_empty_blocks=self.includes_zero_width)
                base, seconds = self.tracks([model, small], self.workload, paced.runs)
                bases.append(base)
                for track in TRACKS:
                    found[track][site.kind].append((units, (seconds[track] - base[track]) / count))
        self._warn(bases)
        return short, deep, {
            track: {kind: tuple(sorted(of.get(kind, ()))) for kind in ("attention", "mlp")}
            for track, of in found.items()
        }  # fmt: skip

    def _within_time_limit(self, model: Any, sites: Sequence[Site], allowed: float) -> LatencyTableBuilder:
        """This meter, or on a CPU one of fewer runs and widths, so that all take no longer than allowed."""
        if self.device.type != "cpu":
            return self
        one = min(self._turn(model) for _ in range(2))  # the first also loads kernels
        for paced in self._cheaper_builders():
            widths = sum(len(paced.widths(site.kind, site.units)) for site in sites)
            seconds = (3 + 2 * widths) * (paced.runs + 1) * one
            if seconds <= allowed:
                break
        log.info("measuring latency: %d widths, each timed %d times: about %.0f s", widths, paced.runs, max(1, seconds))
        if paced != self and is_emulated(DTYPES[self.workload.dtype], self.device):
            log.info(
                "this CPU has no fast %s: where the model will run in float32, say so by workload.dtype float32",
                self.workload.dtype,
            )
        return paced

    def _turn(self, model: Any) -> float:
        begun = self.clock()
        self.tracks([model], self.workload, 1)
        return (self.clock() - begun) / 2  # with the one that warms up

    def _cheaper_builders(self) -> Iterator[LatencyTableBuilder]:
        few, sparse = min(FEW, self.runs), min(SPARSE, self.points)
        yield from (replace(self, runs=runs) for runs in range(self.runs, few - 1, -1))
        yield from (replace(self, runs=few, points=points) for points in range(self.points - 1, sparse - 1, -1))
        yield from (replace(self, runs=runs, points=sparse) for runs in range(few - 1, 0, -1))

    def _warn(self, bases: Sequence[Seconds]) -> None:
        for phase in PHASES:
            found = sorted(base[f"{phase}.device"] for base in bases)
            middle, wide = statistics.median(found), found[len(found) * 9 // 10] - found[len(found) // 10]
            if wide > NOISY * middle:
                log.warning(
                    "%s of one and the same model varies by %.0f%% here, so the table will, too: quiet the machine",
                    phase, 100 * wide / middle,
                )  # fmt: skip

    def widths(self, kind: str, units: int) -> list[int]:
        """The widths that are measured, below the dense one."""
        if kind == "attention":
            step = -(-units // self.points)
            return list(range(0, units, step))
        step = self.align * -(-units // (self.align * self.points))
        return [*([0] if self.includes_zero_width else []), *sorted({self.align, *range(step, units, step)} - {units})]

    def _scaled(self, table: LatencyTable, like: Sequence[int]) -> LatencyTable:
        """The table whose longer track is what the dense model takes."""
        seconds, like = self._time_dense_model(like)
        factors = dict.fromkeys(TRACKS, 1.0)
        for phase in PHASES:
            told = {
                track: table.outside_layers[track] + sum(table.layers[track][layer].dense for layer in like)
                for track in TRACKS
                if track.startswith(phase)
            }
            longer = max(told, key=lambda track: told[track])
            if told[longer] > 0:
                factors[longer] = seconds[phase] / told[longer]
        scales = ", ".join(f"{track} {factor:.3f}" for track, factor in factors.items())
        log.info("scaled to the dense model: %s", scales)
        return table.scaled(factors)

    def _time_dense_model(self, layers: Sequence[int]) -> tuple[Seconds, Sequence[int]]:
        """Seconds of a request by the dense model, or by as many of its layers as the device holds."""
        while True:
            try:
                whole = build_short_model(self.config, layers, self.workload, self.device)
                return self.seconds([whole], self.workload, self.runs)[0], layers
            except torch.OutOfMemoryError:
                if len(layers) < 2:
                    raise
                layers = layers[: len(layers) // 2]
            gc.collect()
            torch.cuda.empty_cache()
