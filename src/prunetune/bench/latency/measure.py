"""Measure a latency table from short models, each of layers of one kind, all but the first cut to one width.

The seconds of a width are those of a short model of it minus those of the dense short model, over the number of layers
cut. The two are timed in turns, so that a drifting clock rate affects both. The seconds outside of the layers follow
from a short model of twice the depth. At last a request to the dense model is timed as `prunetune bench` does, and in
each phase the longer track is scaled to it: a device that is busy for long runs slower than in short bursts.

On a CPU where a request takes long, such as one without fast bfloat16, there are fewer runs, then fewer widths, so that
a table takes minutes.
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
POINTS = 32  # largest number of widths of an MLP
NOISY = 0.1  # spread of the dense short model's times over their median, above which there is a warning
LONGEST = 180.0  # seconds that all widths may take on a CPU, as far as fewer runs and widths allow:
FEW, SPARSE = 3, 8  # first down to this number of runs, then of widths of an MLP, then to one run
Seconds = Mapping[str, float]  # by track, or by phase
Timer = Callable[[Sequence[Any], WorkloadConfig, int], Sequence[Seconds]]  # of models, workload, runs
Curves = Mapping[str, Mapping[str, LatencyCurve]]  # by track, then by kind of unit


@dataclass(frozen=True)
class LatencyTableBuilder:
    """Measures the latency table of one model, workload and device."""

    config: Any  # of the model
    workload: WorkloadConfig
    device: torch.device
    align: int  # MLP widths are multiples of it
    points: int = POINTS
    runs: int = RUNS
    includes_zero_width: bool = False  # whether an MLP of zero channels is measured, too
    track_timer: Timer = time_tracks
    request_timer: Timer = time_requests
    clock: Callable[[], float] = time.monotonic

    def measure(self, header: Mapping[str, Any]) -> LatencyTable:
        """The table, which takes about a second for each width on a GPU."""
        all_layers = range(self.config.num_hidden_layers)
        meta_model = build_short_model(self.config, all_layers, self.workload, torch.device("meta"))
        dense = model_shape(meta_model, find_sites(meta_model))
        representative = representative_layers(dense)  # {layer: the layer that is measured for it}
        counts = dense.dense_counts()
        layer_bytes = 2.0 * sum(layer.params(counts) for layer in dense.layers.values()) / len(dense.layers)
        depth = short_model_depth(layer_bytes, self.device)
        outside: list[Seconds] = []
        layers: dict[str, dict[int, LayerTiming]] = {track: {} for track in TRACKS}
        measured_layers = sorted(set(representative.values()))
        for layer in measured_layers:
            log.info("measuring latency: layers like %d, %d at a time", layer, depth + 1)
            short, deep, curves = self._measure_layer_kind(dense, layer, depth, LONGEST / len(measured_layers))
            # Deep models outgrow caches, so the rest can seem to take less than no time.
            outside.append({track: max(0.0, 2 * short[track] - deep[track]) for track in TRACKS})
            for track in TRACKS:
                layer_seconds = (deep[track] - short[track]) / (depth + 1)
                layers[track][layer] = LayerTiming(layer_seconds, **curves[track])
        outside_layers = {track: statistics.median(seconds[track] for seconds in outside) for track in TRACKS}
        return self._scaled(LatencyTable(dict(header), outside_layers, layers), list(representative.values()))

    def _measure_layer_kind(
        self, dense: ModelShape, layer: int, depth: int, max_seconds: float
    ) -> tuple[Seconds, Seconds, Curves]:
        """(seconds of the dense short model, of one twice as deep, curves of seconds above dense by width).

        Curves are of one layer; `depth` is the number of layers that a short model cuts.
        """
        model = build_short_model(self.config, [layer] * (depth + 1), self.workload, self.device)
        sites = dense.layers[layer].sites
        paced = self._within_time_limit(model, sites, max_seconds)
        deep_model = build_short_model(self.config, [layer] * 2 * (depth + 1), self.workload, self.device)
        short, deep = self.track_timer([model, deep_model], self.workload, paced.runs)
        del deep_model
        dense_times = [short]
        points: dict[str, dict[str, list[tuple[int, float]]]] = {
            track: {site.kind: [(site.units, 0.0)] for site in sites} for track in TRACKS
        }
        for site in sites:
            for units in paced.widths(site.kind, site.units):
                narrow = narrow_layers(model, site.kind, units, remove_empty_blocks=self.includes_zero_width)
                dense_seconds, seconds = self.track_timer([model, narrow], self.workload, paced.runs)
                dense_times.append(dense_seconds)
                for track in TRACKS:
                    points[track][site.kind].append((units, (seconds[track] - dense_seconds[track]) / depth))
        _warn_if_noisy(dense_times)
        curves = {
            track: {kind: tuple(sorted(by_kind.get(kind, ()))) for kind in ("attention", "mlp")}
            for track, by_kind in points.items()
        }
        return short, deep, curves

    def widths(self, kind: str, units: int) -> list[int]:
        """The widths below the dense one, `units`, that are measured."""
        if kind == "attention":
            return list(range(0, units, -(-units // self.points)))
        step = self.align * -(-units // (self.align * self.points))
        return [*([0] if self.includes_zero_width else []), *sorted({self.align, *range(step, units, step)} - {units})]

    def _within_time_limit(self, model: Any, sites: Sequence[Site], max_seconds: float) -> LatencyTableBuilder:
        """This builder or, on a CPU, one of fewer runs and widths, so that all widths take no longer than that."""
        if self.device.type != "cpu":
            return self
        pair_seconds = []
        for _ in range(2):  # the first also loads kernels
            start = self.clock()
            self.track_timer([model], self.workload, 1)
            pair_seconds.append(self.clock() - start)
        run_seconds = min(pair_seconds) / 2  # a run, and one to warm up
        for paced in self._cheaper_builders():
            widths = sum(len(paced.widths(site.kind, site.units)) for site in sites)
            seconds = (3 + 2 * widths) * (paced.runs + 1) * run_seconds
            if seconds <= max_seconds:
                break
        log.info("measuring latency: %d widths, each timed %d times: about %.0f s", widths, paced.runs, max(1, seconds))
        if paced != self and is_emulated(DTYPES[self.workload.dtype], self.device):
            log.info(
                "this CPU has no fast %s: if the model will run in float32, set workload.dtype to float32",
                self.workload.dtype,
            )
        return paced

    def _cheaper_builders(self) -> Iterator[LatencyTableBuilder]:
        """This builder, then ones of fewer runs, then of fewer widths, then of one run."""
        few, sparse = min(FEW, self.runs), min(SPARSE, self.points)
        yield from (replace(self, runs=runs) for runs in range(self.runs, few - 1, -1))
        yield from (replace(self, runs=few, points=points) for points in range(self.points - 1, sparse - 1, -1))
        yield from (replace(self, runs=runs, points=sparse) for runs in range(few - 1, 0, -1))

    def _scaled(self, table: LatencyTable, layers: Sequence[int]) -> LatencyTable:
        """The table with the longer track of each phase scaled to the time that the dense model takes.

        `layers` has, for each layer of the model, the layer that was measured for it.
        """
        seconds, layers = self._time_dense_model(layers)
        factors = dict.fromkeys(TRACKS, 1.0)
        for phase in PHASES:
            predicted = {
                track: table.outside_layers[track] + sum(table.layers[track][layer].dense for layer in layers)
                for track in TRACKS
                if track.startswith(phase)
            }
            longer = max(predicted, key=lambda track: predicted[track])
            if predicted[longer] > 0:  # a table in which it is not will be refused
                factors[longer] = seconds[phase] / predicted[longer]
        log.info("scaled to the dense model: %s", ", ".join(f"{track} {scale:.3f}" for track, scale in factors.items()))
        return table.scaled(factors)

    def _time_dense_model(self, layers: Sequence[int]) -> tuple[Seconds, Sequence[int]]:
        """(seconds of a request to a model of these layers, the layers), as many of them as fit on the device."""
        while True:
            try:
                model = build_short_model(self.config, layers, self.workload, self.device)
                return self.request_timer([model], self.workload, self.runs)[0], layers
            except torch.OutOfMemoryError:
                if len(layers) < 2:
                    raise
                layers = layers[: len(layers) // 2]
            gc.collect()
            torch.cuda.empty_cache()


def _warn_if_noisy(times: Sequence[Seconds]) -> None:
    """Log a warning if the same model takes times on the device that differ too much, without the outer tenths."""
    for phase in PHASES:
        seconds = sorted(run[f"{phase}.device"] for run in times)
        median, spread = statistics.median(seconds), seconds[len(seconds) * 9 // 10] - seconds[len(seconds) // 10]
        if spread > NOISY * median:
            log.warning(
                "%s of one and the same model varies by %.0f%% here, so the table will, too: quiet the machine",
                phase, 100 * spread / median,
            )  # fmt: skip
