"""From scores to a plan: deterministic, on budget, and always a shape that can be written.

A site's units are ranked by score (ties by index) and taken in blocks: one KV group, or `align` MLP channels. A plan
is *maximal*: it is not above the target, and no further block fits under it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunetune.budget.params import total
from prunetune.errors import PlanError
from prunetune.model.sites import Site
from prunetune.plan import Plan

Scores = Mapping[str, Tensor]  # site name -> one score per unit; higher stays


@dataclass(frozen=True)
class Shape:
    """What a legal plan looks like."""

    layout: str = "per-layer"
    align: int = 128  # MLP widths are multiples of this (or the dense width)
    min_groups: int = 0  # KV groups that every layer keeps
    legal_groups: Callable[[int], bool] = lambda groups: True  # may all layers have this many? (uniform layout)
    tensor_parallel: int = 1  # every width is a multiple of this, so that so many devices share each layer

    def block(self, site: Site) -> int:
        """Units that come and go together."""
        return math.lcm(self.align, self.tensor_parallel) if site.kind == "mlp" else self.tensor_parallel


def default_align(sites: Sequence[Site]) -> int:
    """128 channels, the width that GPUs and 4-bit formats want; 32, the floor of both, for narrow models."""
    widest = max((site.units for site in sites if site.kind == "mlp"), default=1)
    return 128 if widest >= 4096 else max(1, min(32, widest // 4))


def select(scores: Scores, sites: Sequence[Site], keep: float, shape: Shape) -> Plan:
    """The plan of the highest scores that keeps at most `keep` of the prunable parameters.

    Raises `PlanError` with the smallest feasible keep where even the floors are above the target.
    """
    target = int(keep * total(sites) * (1 + 1e-12))  # a keep that was computed as a share may be short by rounding
    _check_parallel(sites, shape)
    lowest = floor(sites, shape)
    if target < lowest:
        raise PlanError(
            f"budget.keep {keep:g} is below what is feasible ({_rounded_up(lowest / total(sites))}) "
            f"for layout {shape.layout} with budget.align {shape.align}: "
            "raise budget.keep, or lower budget.align or budget.min_groups"
        )
    scores = {site.name: scores[site.name].detach().float().cpu() for site in sites}
    ranked = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}
    widths = (
        _uniform(scores, ranked, sites, target, shape)
        if shape.layout == "uniform"
        else _free(scores, ranked, sites, target, shape)
    )
    return Plan(
        {site.name: tuple(sorted(ranked[site.name][: widths[site.name]].tolist())) for site in sites},
        {site.name: site.units for site in sites},
    )


def _check_parallel(sites: Sequence[Site], shape: Shape) -> None:
    """Refuse a number of devices that the dense model itself does not divide over."""
    odd = next((site for site in sites if site.units % shape.tensor_parallel), None)
    if odd:
        units = "KV groups" if odd.kind == "attention" else "MLP channels"
        fitting = math.gcd(*(site.units for site in sites))
        raise PlanError(
            f"budget.tensor_parallel {shape.tensor_parallel} does not divide the {odd.units} {units} of {odd.name}: "
            f"use a divisor of {fitting}"
        )


def floor(sites: Sequence[Site], shape: Shape) -> int:
    """Prunable parameters of the smallest legal plan."""
    if shape.layout == "uniform":
        layers = _layers(sites)
        return layers * min(g * p_g + c * p_c for g, c, p_g, p_c in _uniform_shapes(sites, shape))
    return sum(site.unit_params * floor_width(site, shape) for site in sites)


def floor_width(site: Site, shape: Shape) -> int:
    """Fewest units that a site keeps."""
    block = shape.block(site)
    if site.kind == "mlp":
        return min(block, site.units)
    return min(-(-max(site.floor, shape.min_groups) // block) * block, site.units)


def feasible_keep(sites: Sequence[Site], shape: Shape) -> float:
    """The smallest keep that some legal plan meets."""
    return floor(sites, shape) / total(sites)


def _rounded_up(share: float) -> str:
    return f"{-(-share * 1000 // 1) / 1000:.3f}"


def _free(
    scores: Scores, ranked: Mapping[str, Tensor], sites: Sequence[Site], target: int, shape: Shape
) -> dict[str, int]:
    widths = {site.name: floor_width(site, shape) for site in sites}
    spent = sum(site.unit_params * widths[site.name] for site in sites)
    offers = [
        (-score, order, width, block)
        for order, site in enumerate(sites)
        for score, width, block in _blocks(scores[site.name][ranked[site.name]], site, widths[site.name], shape)
    ]
    # Blocks of one site come in descending score, so taking the best offers first never skips within a site ...
    closed: set[str] = set()
    for _, order, _, block in sorted(offers):
        site = sites[order]
        if site.name in closed:
            continue
        if spent + block * site.unit_params > target:
            closed.add(site.name)  # ... and a site whose block did not fit takes no later, smaller one.
            continue
        widths[site.name] += block
        spent += block * site.unit_params
    return widths


def _blocks(ranked: Tensor, site: Site, width: int, shape: Shape) -> list[tuple[float, int, int]]:
    """(mean score, width below, size) of each block above `width`; the last block takes what is left."""
    size = shape.block(site)
    edges = [*range(width, site.units, size), site.units]
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ranked.double().cumsum(0)])[edges].tolist()
    return [
        ((sums[i + 1] - sums[i]) / (high - low), low, high - low)
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]


def _layers(sites: Sequence[Site]) -> int:
    return len({site.layer for site in sites})


def _uniform_shapes(sites: Sequence[Site], shape: Shape) -> list[tuple[int, int, int, int]]:
    """All (groups, channels) that every layer may have, with the prices of one group and one channel."""
    found = {(site.kind, site.units, site.unit_params) for site in sites}
    if len(found) > len({site.kind for site in sites}):
        raise PlanError("layout uniform needs equal layers, and this model's differ: use layout per-layer")
    groups, channels, prices = [0], [0], {"attention": 0, "mlp": 0}  # of a kind that this architecture cannot lose
    for kind, units, price in found:
        prices[kind] = price
        if kind == "attention":
            lowest, size = min(max(1, shape.min_groups), units), shape.tensor_parallel
            groups = [g for g in range(lowest, units + 1) if g % size == 0 and shape.legal_groups(g)]
        else:
            size = math.lcm(shape.align, shape.tensor_parallel)
            channels = [*range(min(size, units), units, size), units]
    return [(g, c, prices["attention"], prices["mlp"]) for g in groups for c in channels]


def _uniform(
    scores: Scores, ranked: Mapping[str, Tensor], sites: Sequence[Site], target: int, shape: Shape
) -> dict[str, int]:
    """One width per kind for all layers: of the maximal shapes, the one that keeps the highest scores."""
    layers = _layers(sites)
    best: dict[int, tuple[int, int]] = {}  # groups -> (price, channels): the widest MLP that still fits
    for g, c, p_g, p_c in _uniform_shapes(sites, shape):
        price = layers * (g * p_g + c * p_c)
        if price <= target and price > best.get(g, (0, 0))[0]:
            best[g] = (price, c)
    # Maximal ones only: scores may be negative, and then a shape with room to spare would look worth more.
    best = {g: fit for g, fit in best.items() if not any(w > g and best[w][1] >= fit[1] for w in best)}

    def worth(groups: int) -> tuple[float, int]:
        value = 0.0
        for site in sites:
            width = groups if site.kind == "attention" else best[groups][1]
            top = scores[site.name].double()[ranked[site.name]][:width]
            value += float(top.sum()) * site.unit_params
        return value, best[groups][0]

    chosen = max(best, key=worth)
    return {site.name: chosen if site.kind == "attention" else best[chosen][1] for site in sites}
