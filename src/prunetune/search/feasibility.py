"""Before any training: whether budgets can be met, what comes nearest where not, and what units are priced at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunetune.config.quantities import within
from prunetune.cost.deployment import Cost, total
from prunetune.cost.limits import Cap, Limits
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.units import Site, inner_sites
from prunetune.search.nested_sites import Nest
from prunetune.search.plan_rules import Shape, floor_width
from prunetune.search.select import floor_widths, select

LEAST = 1e-3  # of its parameters: the price of a unit that costs nothing, so that scores per price stay finite


def even(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Scores under which every site keeps about the same share of its units."""
    return {site.name: -((torch.arange(site.units) % site.length) + 0.5) / site.length for site in sites}


def limited(shape: Shape, sites: Sequence[Site], caps: Sequence[Cap], told: float) -> Shape:
    """The shape of plans within all of these budgets; `told` is `budget.keep`, 1 where it was not given.

    Raises `PlanError` with the nearest feasible amount for one that no plan meets, and where nothing would have to go.
    """
    nest = Nest(sites)
    lowest = nest.counts(floor_widths(nest, shape), nest.sites)
    for cap in caps:
        _refuse(cap, cap.cost(lowest), shape)
    if told >= 1 and all(cap.is_slack for cap in caps):
        cap, rate = caps[0], caps[0].kind == "throughput"
        raise PlanError(
            f"budget.{cap.kind} {cap.words(cap.limit)} is met by the dense model ({cap.words(cap.dense)}), so nothing "
            f"would have to go: state {'more' if rate else 'less'} than that"
        )
    spans = _spans(nest, shape, caps)
    prices = _own(sites, spans)
    limits = Limits(tuple(caps), told, 0.0, 0.0, prices, spans)
    plan = select(even(sites), sites, 0.0, replace(shape, limits=limits))
    weights = {site.name: site.unit_params for site in sites}
    return replace(shape, limits=replace(limits, keep=_share(plan, weights), share=_share(plan, prices)))


def _share(plan: Plan, prices: Mapping[str, float]) -> float:
    kept = sum(len(units) * prices[site] for site, units in plan.kept.items())
    return float(kept / sum(count * prices[site] for site, count in plan.units.items()))


def _refuse(cap: Cap, lowest: float, shape: Shape) -> None:
    if lowest <= cap.limit * (1 + 1e-9):
        return
    side = "above" if cap.kind == "throughput" else "below"
    raise PlanError(
        f"budget.{cap.kind} {cap.words(cap.limit)} is {side} what is feasible "
        f"({within(cap.amount(lowest), cap.kind)}; dense {cap.words(cap.dense)}) for layout {shape.layout} with "
        f"budget.align {shape.align}: state that, or lower budget.align, budget.min_groups or budget.min_share"
    )


# -- prices --------------------------------------------------------------------------------------------------------


def _spans(nest: Nest, shape: Shape, caps: Sequence[Cap]) -> dict[str, float]:
    """Of a unit with what is inside it, in parameters: its share of what the budgets want to be rid of.

    Each budget weighs as much as it wants to go, so that one which the dense model meets has no say.
    """
    goals = [max(0.0, 1 - cap.limit / cap.dense) for cap in caps]
    goals = goals if any(goals) else [1.0] * len(caps)
    found = {site.name: 0.0 for site in nest.sites}
    everything = sum(site.params for site in nest.sites)
    for cap, goal in zip(caps, goals, strict=True):
        longest = max(cap.costs, key=lambda cost: total(cost, cost.anatomy.dense()))
        each = {site.name: _slope(nest, site, shape, longest) for site in nest.sites}
        whole = sum(site.units * each[site.name] for site in nest.sites if not site.within)
        for name, slope in each.items():
            found[name] += goal / sum(goals) * slope * everything / whole if whole else 0.0
    return {site.name: max(found[site.name], LEAST * site.price, LEAST) for site in nest.sites}


def _slope(nest: Nest, site: Site, shape: Shape, cost: Cost) -> float:
    """Cost that a unit takes along, as a mean from the dense width down to the floor."""
    sites = [one for one in nest.sites if one.layer == site.layer]
    widths = {one.name: one.length for one in sites}
    free = replace(shape, protected=frozenset())
    low = 0 if site.is_whole else min(floor_width(site, free), site.length - 1)
    dense = nest.counts(widths, sites)
    less = nest.counts({**widths, site.name: low}, sites)
    gone = dense[site.name] - less[site.name]
    return (cost.of_layer(site.layer, dense) - cost.of_layer(site.layer, less)) / gone


def _own(sites: Sequence[Site], spans: Mapping[str, float]) -> dict[str, float]:
    """The same without what is inside."""
    inner = inner_sites(sites)
    return {
        site.name: max(
            spans[site.name] - sum(one.units // site.units * spans[one.name] for one in inner.get(site.name, ())),
            LEAST,
        )
        for site in sites
    }
