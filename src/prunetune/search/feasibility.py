"""Before training: whether the budgets can be met, the nearest amount if not, and the price of each unit under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunetune.config.quantities import format_amount_rounded_to_limit
from prunetune.cost.budget_limits import BudgetLimit, BudgetLimits
from prunetune.cost.deployment import Cost, total_cost
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.units import Site, children_by_site
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints, min_width
from prunetune.search.select import RELATIVE_TOLERANCE, min_widths, select

MIN_PRICE = 1e-3  # the least price of a unit, times its parameters: scores are divided by prices


def uniform_scores(sites: Sequence[Site]) -> dict[str, Tensor]:
    """{site: [U]}: scores under which every site keeps about the same share of its units."""
    return {
        site.name: -((torch.arange(site.units) % site.units_per_group) + 0.5) / site.units_per_group for site in sites
    }


def with_limits(
    constraints: PlanConstraints, sites: Sequence[Site], budgets: Sequence[BudgetLimit], requested_keep: float
) -> PlanConstraints:
    """The constraints with these budgets as limits; `requested_keep` is `budget.keep`, 1 where it was not given.

    Raises `PlanError` with the nearest feasible amount if no plan meets one of them, and if the dense model meets all.
    """
    nested_sites = NestedSites(sites)
    lowest = nested_sites.kept_unit_counts(min_widths(nested_sites, constraints), nested_sites.sites)
    for budget in budgets:
        least = budget.cost(lowest)
        if least > budget.limit * (1 + RELATIVE_TOLERANCE):
            side = "above" if budget.kind == "throughput" else "below"
            nearest = format_amount_rounded_to_limit(budget.to_amount(least), budget.kind)
            raise PlanError(
                f"budget.{budget.kind} {budget.format_cost(budget.limit)} is {side} what is feasible "
                f"({nearest}; dense {budget.format_cost(budget.dense_cost)}) for layout {constraints.layout} with "
                f"budget.align {constraints.align}: state that, or lower budget.align, budget.min_groups or "
                "budget.min_share"
            )
    if requested_keep >= 1 and all(budget.is_met_by_dense for budget in budgets):
        first = budgets[0]
        raise PlanError(
            f"budget.{first.kind} {first.format_cost(first.limit)} is met by the dense model "
            f"({first.format_cost(first.dense_cost)}), so nothing would have to be pruned: "
            f"state {'more' if first.kind == 'throughput' else 'less'} than that"
        )
    prices_with_children = _prices_with_children(nested_sites, constraints, budgets)
    prices = _prices_without_children(sites, prices_with_children)
    limits = BudgetLimits(tuple(budgets), requested_keep, 0.0, 0.0, prices, prices_with_children)
    plan = select(uniform_scores(sites), sites, 0.0, replace(constraints, limits=limits))
    feasible_keep = _kept_share(plan, {site.name: site.unit_params for site in sites})
    limits = replace(limits, feasible_keep=feasible_keep, feasible_price_share=_kept_share(plan, prices))
    return replace(constraints, limits=limits)


def _kept_share(plan: Plan, prices: Mapping[str, float]) -> float:
    """Price of the kept units over that of all units."""
    kept = sum(len(units) * prices[site] for site, units in plan.kept.items())
    return float(kept / sum(count * prices[site] for site, count in plan.units.items()))


def _prices_with_children(
    nested_sites: NestedSites, constraints: PlanConstraints, budgets: Sequence[BudgetLimit]
) -> dict[str, float]:
    """{site: price of a unit and all that it contains}, as parameters that cost the budgets as much.

    A budget weighs as much as the share of the dense cost that it asks to remove, so one that the dense model meets
    does not count, unless it meets all.
    """
    removals = [max(0.0, 1 - budget.limit / budget.dense_cost) for budget in budgets]
    removals = removals if any(removals) else [1.0] * len(budgets)
    all_params = sum(site.params for site in nested_sites.sites)
    prices = {site.name: 0.0 for site in nested_sites.sites}
    for budget, removal in zip(budgets, removals, strict=True):
        cost = max(budget.costs, key=lambda cost: total_cost(cost, cost.dense_shape.dense_counts()))
        unit_costs = {site.name: _mean_unit_cost(nested_sites, site, constraints, cost) for site in nested_sites.sites}
        prunable_cost = sum(site.units * unit_costs[site.name] for site in nested_sites.sites if not site.parent)
        for name, unit_cost in unit_costs.items():
            prices[name] += removal / sum(removals) * unit_cost * all_params / prunable_cost if prunable_cost else 0.0
    total_params = {site.name: site.total_unit_params for site in nested_sites.sites}
    return {name: max(price, MIN_PRICE * total_params[name], MIN_PRICE) for name, price in prices.items()}


def _mean_unit_cost(nested_sites: NestedSites, site: Site, constraints: PlanConstraints, cost: Cost) -> float:
    """Mean cost of a unit with all that it contains, between the dense width and the least."""
    layer_sites = [other for other in nested_sites.sites if other.layer == site.layer]
    widths = {other.name: other.units_per_group for other in layer_sites}
    unprotected = replace(constraints, protected=frozenset())
    narrowest = 0 if site.kind.is_whole_block else min(min_width(site, unprotected), site.units_per_group - 1)
    dense = nested_sites.kept_unit_counts(widths, layer_sites)
    narrow = nested_sites.kept_unit_counts({**widths, site.name: narrowest}, layer_sites)
    saved = cost.layer_cost(site.layer, dense) - cost.layer_cost(site.layer, narrow)
    return saved / (dense[site.name] - narrow[site.name])


def _prices_without_children(sites: Sequence[Site], prices_with_children: Mapping[str, float]) -> dict[str, float]:
    """{site: price of a unit without the units that it contains}."""
    child_sites = children_by_site(sites)
    prices = {}
    for site in sites:
        children = child_sites.get(site.name, ())
        inside = sum(child.units // site.units * prices_with_children[child.name] for child in children)
        prices[site.name] = max(prices_with_children[site.name] - inside, MIN_PRICE)
    return prices
