"""Measure a latency table: the same requests as `prunetune bench`, of short models that differ in one width.

With n layers of a width, one dense layer in front and everything else equal, the width's seconds are the difference to
the dense short model over n; the two take turns, so that a clock that drifts is both's. What is outside the layers
follows from the whole depth, so that the table gives the dense model's own time exactly.
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prunetune.bench.recorded import Recorded
from prunetune.bench.request import Times, answered, tokens_for
from prunetune.budget.anatomy import Anatomy, anatomy_of
from prunetune.budget.latency import PHASES, Curve, Table, Timed, alike
from prunetune.config import WorkloadConfig
from prunetune.model.sites import find_sites
from prunetune.timing.stacks import depth, narrowed, stack

log = logging.getLogger(__name__)
RUNS = 5  # of which the median counts, after one to warm up
NOISY = 0.1
POINTS = 32  # most widths of an MLP
Seconds = Mapping[str, float]  # by phase
Timer = Callable[[Sequence[Any], WorkloadConfig, int], Sequence[Seconds]]


def seconds_of(models: Sequence[Any], workload: WorkloadConfig, runs: int = RUNS) -> list[dict[str, float]]:
    """{phase: median seconds} of a batch of the workload's requests, for each model; they take turns, run by run."""
    asked = [_asked(model, workload) for model in models]
    found = [[ask() for ask in asked] for _ in range(runs + 1)][1:]  # the first warms up
    return [
        {phase: statistics.median(getattr(turn[place], phase) for turn in found) for phase in PHASES}
        for place in range(len(models))
    ]


def _asked(model: Any, workload: WorkloadConfig) -> Callable[[], Times]:
    """The model's answer to one batch of requests. What was recorded knows its cache by address: it is used again."""
    from transformers import DynamicCache, StaticCache

    tokens = tokens_for(model, workload.batch, workload.prompt)
    if workload.runtime == "eager":
        return lambda: answered(model, tokens, DynamicCache(config=model.config), workload.generate)
    step = Recorded(model)
    cache = StaticCache(model.config, max_cache_len=workload.prompt + workload.generate)

    def ask() -> Times:
        cache.reset()
        return answered(model, tokens, cache, workload.generate, step)

    return ask


@dataclass(frozen=True)
class Meter:
    """One model's table in the making."""

    config: Any
    workload: WorkloadConfig
    device: torch.device
    align: int
    points: int = POINTS
    runs: int = RUNS
    whole: bool = False  # a width of zero channels, too
    timer: Timer = seconds_of

    def table(self, header: Mapping[str, Any]) -> Table:
        """Everything, which takes about a second a width on a GPU."""
        dense = self._ghost()
        like = alike(dense)
        count = depth(self._layer_bytes(dense), self.device)
        shorts: dict[int, Seconds] = {}
        curves: dict[int, dict[str, dict[str, Curve]]] = {}
        for layer in sorted(set(like.values())):
            log.info("measuring latency: layers like %d, %d at a time", layer, count + 1)
            shorts[layer], curves[layer] = self._kind(dense, layer, count)
        times = -(-2 * (count + 1) // len(like))  # at least twice as deep, to tell layers from the rest
        layers: Sequence[int] = list(like) * times
        whole, layers = self._deep(layers, count + 1)
        numbers = {layer: sum(like[one] == layer for one in layers) for layer in shorts}
        rest = {phase: _rest(shorts, whole, numbers, count + 1, phase) for phase in PHASES}
        timed = {
            phase: {
                layer: Timed((shorts[layer][phase] - rest[phase]) / (count + 1), **curves[layer][phase])
                for layer in shorts
            }
            for phase in PHASES
        }
        return Table(dict(header), rest, timed)

    def _ghost(self) -> Anatomy:
        model = stack(self.config, range(self.config.num_hidden_layers), self.workload, torch.device("meta"))
        return anatomy_of(model, find_sites(model))

    def _layer_bytes(self, anatomy: Anatomy) -> float:
        counts = anatomy.dense()
        return 2.0 * sum(layer.params(counts) for layer in anatomy.layers.values()) / len(anatomy.layers)

    def _kind(self, anatomy: Anatomy, layer: int, count: int) -> tuple[Seconds, dict[str, dict[str, Curve]]]:
        """Seconds of the dense short model, and of every width beyond it, for each layer."""
        model = stack(self.config, [layer] * (count + 1), self.workload, self.device)
        sites = anatomy.layers[layer].sites
        bases: list[Seconds] = []
        found: dict[str, dict[str, list[tuple[int, float]]]] = {
            phase: {site.kind: [(site.units, 0.0)] for site in sites} for phase in PHASES
        }
        for site in sites:
            for units in self._widths(site.kind, site.units):
                small = narrowed(model, site.kind, units, whole=self.whole)
                base, seconds = self.timer([model, small], self.workload, self.runs)
                bases.append(base)
                for phase in PHASES:
                    found[phase][site.kind].append((units, (seconds[phase] - base[phase]) / count))
        dense = {phase: statistics.median(base[phase] for base in bases) for phase in PHASES}
        spread = max((max(base[phase] for base in bases) / dense[phase] - 1 for phase in PHASES), default=0.0)
        if spread > NOISY:
            log.warning(
                "one model's time varies by %.0f%% here, so the table will, too: quiet the machine", 100 * spread
            )
        return dense, {
            phase: {kind: tuple(sorted(of.get(kind, ()))) for kind in ("attention", "mlp")}
            for phase, of in found.items()
        }

    def _widths(self, kind: str, units: int) -> list[int]:
        """Those that are measured, below the dense one."""
        if kind == "attention":
            step = -(-units // self.points)
            return list(range(0, units, step))
        step = self.align * -(-units // (self.align * self.points))
        return [*([0] if self.whole else []), *sorted({self.align, *range(step, units, step)} - {units})]

    def _deep(self, layers: Sequence[int], short: int) -> tuple[dict[str, float], Sequence[int]]:
        """Seconds of the whole depth, or of as much of it as the device holds; never about as deep as a short model."""
        while True:
            try:
                whole = stack(self.config, layers, self.workload, self.device)
                return dict(self.timer([whole], self.workload, self.runs)[0]), layers
            except torch.OutOfMemoryError:
                if len(layers) < 2:
                    raise
                half = len(layers) // 2
                layers = layers[: half if half >= 1.5 * short or half < short else short // 2]
            gc.collect()
            torch.cuda.empty_cache()


def _rest(shorts: Mapping[int, Seconds], whole: Seconds, numbers: Mapping[int, int], count: int, phase: str) -> float:
    """What is outside the layers: short models are rest + count * layer, and the deep one rest + the sum of its own."""
    apart = sum(numbers[layer] / count * seconds[phase] for layer, seconds in shorts.items())
    return (apart - whole[phase]) / (sum(numbers.values()) / count - 1)
