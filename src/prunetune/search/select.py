"""From scores to a plan: deterministic, on budget, and always a shape that can be written.

A site's units are ranked by score (ties by index) and taken in blocks: one KV group, or `align` MLP channels; of sites
with lanes, as many from each. What is inside a unit is offered after it, and only where it stays. A plan is *maximal*:
it is not above the target, and no further block fits under it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.cost.deployment import Cost
from prunetune.cost.deployment import total as total_cost
from prunetune.cost.parameters import total
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.nested_sites import Nest, plan_of
from prunetune.search.plan_rules import Shape, default_align, floor_width, refuse_devices, step
from prunetune.search.uniform import uniform_floor, uniform_widths

TINY = 1e-9  # of a limit: sums of many layers are inexact


class Room:
    """Keeps the costs of every layer under some widths, and says what still fits under every limit."""

    def __init__(self, nest: Nest, caps: Sequence[tuple[Cost, float]]) -> None:
        self.nest, self.caps = nest, tuple(caps)
        self.by_layer: dict[int, list[Site]] = {}
        for site in nest.sites:
            self.by_layer.setdefault(site.layer, []).append(site)
        self.costs: list[dict[int, float]] = []
        self.spent: list[float] = []

    def open(self, widths: Mapping[str, int]) -> None:
        """Start from these widths."""
        counts = self.nest.counts(widths, self.nest.sites)
        self.costs = [{layer: cost.of_layer(layer, counts) for layer in cost.anatomy.layers} for cost, _ in self.caps]
        self.spent = [cost.fixed + sum(of.values()) for (cost, _), of in zip(self.caps, self.costs, strict=True)]

    def takes(self, site: Site, block: int, widths: Mapping[str, int]) -> bool:
        """Spend for so many more units of a site's lanes, where every limit allows it."""
        if not self.caps:
            return True
        counts = self.nest.counts({**widths, site.name: widths[site.name] + block}, self.by_layer[site.layer])
        new = [cost.of_layer(site.layer, counts) for cost, _ in self.caps]
        spent = [before - of[site.layer] + now for before, of, now in zip(self.spent, self.costs, new, strict=True)]
        if any(value > limit * (1 + TINY) for value, (_, limit) in zip(spent, self.caps, strict=True)):
            return False
        self.spent = spent
        for of, now in zip(self.costs, new, strict=True):
            of[site.layer] = now
        return True

    def holds(self, widths: Mapping[str, int]) -> bool:
        """Whether every limit allows these widths."""
        if not self.caps:
            return True
        counts = self.nest.counts(widths, self.nest.sites)
        return all(total_cost(cost, counts) <= limit * (1 + TINY) for cost, limit in self.caps)


__all__ = ["Scores", "Shape", "default_align", "feasible_keep", "floor", "floor_width", "floor_widths", "select"]

Scores = Mapping[str, Tensor]  # site name -> one score per unit; higher stays


def select(scores: Scores, sites: Sequence[Site], keep: float, shape: Shape, *, within: Plan | None = None) -> Plan:
    """The plan of the highest scores that keeps at most `keep` of the prunable parameters; see `best_units`."""
    return plan_of(best_units(Nest(sites, scores, within), keep, shape))


def best_units(nest: Nest, keep: float, shape: Shape) -> dict[str, Tensor]:
    """The units of highest scores that hold at most `keep` of the prunable parameters: {site: bool [U]}.

    Under `shape.limits`, `keep` says how far these have come (`budget.limits`), and the plan is within all of them.
    A nest may lie within a larger plan of the same shape, and then a plan is maximal inside that.
    Raises `PlanError` with the smallest feasible keep where even the floors are above the target.
    """
    sites = nest.sites
    caps = shape.limits.at(keep) if shape.limits else ()
    keep = shape.limits.params_at(keep) if shape.limits else keep
    target = int(keep * total(sites) * (1 + 1e-12))  # a keep that was computed as a share may be short by rounding
    refuse_devices(sites, shape)
    lowest = floor(sites, shape)
    if target < lowest:
        raise PlanError(
            f"budget.keep {keep:g} is below what is feasible ({_rounded_up(lowest / total(sites))}) "
            f"for layout {shape.layout} with budget.align {shape.align}: "
            "raise budget.keep, or lower budget.align or budget.min_groups"
        )
    room = Room(nest, caps)
    if caps and not room.holds(floor_widths(nest, shape)):
        raise PlanError(
            f"not even the smallest plan of layout {shape.layout} with budget.align {shape.align} is within all "
            "budgets: raise one of them, or lower budget.align, budget.min_groups or budget.min_share"
        )
    if shape.layout == "uniform":
        return nest.best_units(uniform_widths(nest, target, shape, room.holds if caps else None))
    return nest.best_units(_free(nest, target, shape, room))


def floor(sites: Sequence[Site], shape: Shape) -> int:
    """Prunable parameters of the smallest legal plan."""
    nest = Nest(sites)
    return nest.price(floor_widths(nest, shape))


def floor_widths(nest: Nest, shape: Shape) -> dict[str, int]:
    """Of the smallest legal plan."""
    if shape.layout == "uniform":
        return uniform_floor(nest, shape)
    return {site.name: floor_width(site, shape) for site in nest.sites}


def feasible_keep(sites: Sequence[Site], shape: Shape) -> float:
    """The smallest keep that some legal plan meets."""
    return floor(sites, shape) / total(sites)


def _rounded_up(share: float) -> str:
    return f"{-(-share * 1000 // 1) / 1000:.3f}"


def _free(nest: Nest, target: int, shape: Shape, room: Room) -> dict[str, int]:
    widths = floor_widths(nest, shape)
    spent = nest.price(widths)
    room.open(widths)
    # Blocks of one site come in descending score, so taking the best offers first never skips within a site ...
    closed: set[str] = set()
    waiting: dict[str, int] = {}
    for _, place, _, block in _offers(nest, widths, shape):
        site = nest.sites[place]
        if site.name in closed:
            continue
        block += waiting.pop(site.name, 0)
        # Prices only rise as more is opened around or inside, and room only falls: what is closed stays so.
        lanes = nest.open_lanes(site, widths)
        price = block * lanes * nest.span(site, widths)
        if not lanes or spent + price > target:
            closed.add(site.name)  # ... and a site whose block did not fit takes no later, smaller one.
            continue
        if not room.takes(site, block, widths):
            waiting[site.name] = block  # More may cost no more where hardware works in tiles: asked with the next.
            continue
        widths[site.name] += block
        spent += price
    return widths


def _cap(nest: Nest, site: Site, widths: Mapping[str, int]) -> float:
    """The score at which the first unit around a site is offered; what is inside comes no earlier."""
    outer = nest.outer(site)
    if outer is None:
        return math.inf
    return min(math.inf if widths[outer.name] else nest.best(outer), _cap(nest, outer, widths))


def _offers(nest: Nest, widths: Mapping[str, int], shape: Shape) -> list[tuple[float, int, int, int]]:
    """(minus mean score, place of the site, width below, size) of each block above `widths`, the best one first.

    The last block of a site takes what is left.
    """
    offers = []
    for place, site in enumerate(nest.sites):
        most, width, size, cap = nest.most(site), widths[site.name], step(site, shape), _cap(nest, site, widths)
        held = torch.zeros(most + 1, dtype=torch.float64)
        torch.cumsum(nest.mean(site)[:most], 0, out=held[1:])
        edges, sums = [*range(width, most, size), most], [*held[width:-1:size].tolist(), float(held[-1])]
        offers += [
            (-min((after - before) / (high - low), cap), place, low, high - low)
            for low, high, before, after in zip(edges, edges[1:], sums, sums[1:], strict=False)
        ]
    return sorted(offers)
