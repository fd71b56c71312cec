"""Before any training: whether budgets can be met, what comes nearest where not, and what units are priced at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunetune.config.quantities import format_amount_rounded_to_limit
from prunetune.cost.deployment import Cost, total_cost
from prunetune.cost.limits import BudgetLimit, BudgetLimits
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.units import Site, children_by_site
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints, min_width
from prunetune.search.select import min_widths, select

MIN_PRICE = 1e-3  # of its parameters: the price of a unit that costs nothing, so that scores per price stay finite


def uniform_scores(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Scores under which every site keeps about the same share of its units."""
    return {
        site.name: -((torch.arange(site.units) % site.units_per_group) + 0.5) / site.units_per_group for site in sites
    }


def with_limits(
    constraints: PlanConstraints, sites: Sequence[Site], caps: Sequence[BudgetLimit], requested_keep: float
) -> PlanConstraints:
    """The shape of plans within all of these budgets; `told` is `budget.keep`, 1 where it was not given.

    Raises `PlanError` with the nearest feasible amount for one that no plan meets, and where nothing would have to go.
    """
    nest = NestedSites(sites)
    lowest = nest.kept_unit_counts(min_widths(nest, constraints), nest.sites)
    for cap in caps:
        _check_feasible(cap, cap.cost(lowest), constraints)
    if requested_keep >= 1 and all(cap.is_met_by_dense for cap in caps):
        cap, rate = caps[0], caps[0].kind == "throughput"
        raise PlanError(
            f"budget.{cap.kind} {cap.format_cost(cap.limit)} is met by the dense model ({cap.format_cost(cap.dense_cost)}), so nothing "
            f"would have to go: state {'more' if rate else 'less'} than that"
        )
    spans = _prices_with_children(nest, constraints, caps)
    prices = _prices_without_children(sites, spans)
    limits = BudgetLimits(tuple(caps), requested_keep, 0.0, 0.0, prices, spans)
    plan = select(uniform_scores(sites), sites, 0.0, replace(constraints, limits=limits))
    weights = {site.name: site.unit_params for site in sites}
    return replace(
        constraints,
        limits=replace(
            limits, feasible_keep=_kept_share(plan, weights), feasible_price_share=_kept_share(plan, prices)
        ),
    )


def _kept_share(plan: Plan, prices: Mapping[str, float]) -> float:
    kept = sum(len(units) * prices[site] for site, units in plan.kept.items())
    return float(kept / sum(count * prices[site] for site, count in plan.units.items()))


def _check_feasible(cap: BudgetLimit, lowest: float, constraints: PlanConstraints) -> None:
    if lowest <= cap.limit * (1 + 1e-9):
        return
    side = "above" if cap.kind == "throughput" else "below"
    raise PlanError(
        f"budget.{cap.kind} {cap.format_cost(cap.limit)} is {side} what is feasible "
        f"({format_amount_rounded_to_limit(cap.to_amount(lowest), cap.kind)}; dense {cap.format_cost(cap.dense_cost)}) for layout {constraints.layout} with "
        f"budget.align {constraints.align}: state that, or lower budget.align, budget.min_groups or budget.min_share"
    )


# -- prices --------------------------------------------------------------------------------------------------------


def _prices_with_children(
    nested_sites: NestedSites, constraints: PlanConstraints, caps: Sequence[BudgetLimit]
) -> dict[str, float]:
    """Of a unit with what is inside it, in parameters: its share of what the budgets want to be rid of.

    Each budget weighs as much as it wants to go, so that one which the dense model meets has no say.
    """
    goals = [max(0.0, 1 - cap.limit / cap.dense_cost) for cap in caps]
    goals = goals if any(goals) else [1.0] * len(caps)
    found = {site.name: 0.0 for site in nested_sites.sites}
    everything = sum(site.params for site in nested_sites.sites)
    for cap, goal in zip(caps, goals, strict=True):
        longest = max(cap.costs, key=lambda cost: total_cost(cost, cost.dense_shape.dense_counts()))
        each = {site.name: _mean_unit_cost(nested_sites, site, constraints, longest) for site in nested_sites.sites}
        whole = sum(site.units * each[site.name] for site in nested_sites.sites if not site.parent)
        for name, slope in each.items():
            found[name] += goal / sum(goals) * slope * everything / whole if whole else 0.0
    return {
        site.name: max(found[site.name], MIN_PRICE * site.total_unit_params, MIN_PRICE) for site in nested_sites.sites
    }


def _mean_unit_cost(nested_sites: NestedSites, site: Site, constraints: PlanConstraints, cost: Cost) -> float:
    """Cost that a unit takes along, as a mean from the dense width down to the floor."""
    sites = [one for one in nested_sites.sites if one.layer == site.layer]
    widths = {one.name: one.units_per_group for one in sites}
    free = replace(constraints, protected=frozenset())
    low = 0 if site.kind.is_whole_block else min(min_width(site, free), site.units_per_group - 1)
    dense = nested_sites.kept_unit_counts(widths, sites)
    less = nested_sites.kept_unit_counts({**widths, site.name: low}, sites)
    gone = dense[site.name] - less[site.name]
    return (cost.layer_cost(site.layer, dense) - cost.layer_cost(site.layer, less)) / gone


def _prices_without_children(sites: Sequence[Site], prices: Mapping[str, float]) -> dict[str, float]:
    """The same without what is inside."""
    inner = children_by_site(sites)
    return {
        site.name: max(
            prices[site.name] - sum(one.units // site.units * prices[one.name] for one in inner.get(site.name, ())),
            MIN_PRICE,
        )
        for site in sites
    }
