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
from prunetune.cost.deployment import total_cost as total_cost
from prunetune.cost.parameters import prunable_params
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.nested_sites import NestedSites, plan_from_gates
from prunetune.search.plan_rules import PlanConstraints, block_size, check_tensor_parallel, default_align, min_width
from prunetune.search.uniform import min_uniform_widths, uniform_widths

RELATIVE_TOLERANCE = 1e-9  # of a limit: sums of many layers are inexact


class BudgetTracker:
    """Keeps the costs of every layer under some widths, and says what still fits under every limit."""

    def __init__(self, nested_sites: NestedSites, caps: Sequence[tuple[Cost, float]]) -> None:
        self.nested_sites, self.caps = nested_sites, tuple(caps)
        self.sites_by_layer: dict[int, list[Site]] = {}
        for site in nested_sites.sites:
            self.sites_by_layer.setdefault(site.layer, []).append(site)
        self.layer_costs: list[dict[int, float]] = []
        self.spent: list[float] = []

    def start_from(self, widths: Mapping[str, int]) -> None:
        """Start from these widths."""
        counts = self.nested_sites.kept_unit_counts(widths, self.nested_sites.sites)
        self.layer_costs = [
            {layer: cost.layer_cost(layer, counts) for layer in cost.dense_shape.layers} for cost, _ in self.caps
        ]
        self.spent = [
            cost.fixed_cost + sum(of.values()) for (cost, _), of in zip(self.caps, self.layer_costs, strict=True)
        ]

    def try_add(self, site: Site, block: int, widths: Mapping[str, int]) -> bool:
        """Spend for so many more units of a site's lanes, where every limit allows it."""
        if not self.caps:
            return True
        counts = self.nested_sites.kept_unit_counts(
            {**widths, site.name: widths[site.name] + block}, self.sites_by_layer[site.layer]
        )
        new = [cost.layer_cost(site.layer, counts) for cost, _ in self.caps]
        spent = [
            before - of[site.layer] + now for before, of, now in zip(self.spent, self.layer_costs, new, strict=True)
        ]
        if any(value > limit * (1 + RELATIVE_TOLERANCE) for value, (_, limit) in zip(spent, self.caps, strict=True)):
            return False
        self.spent = spent
        for of, now in zip(self.layer_costs, new, strict=True):
            of[site.layer] = now
        return True

    def fits(self, widths: Mapping[str, int]) -> bool:
        """Whether every limit allows these widths."""
        if not self.caps:
            return True
        counts = self.nested_sites.kept_unit_counts(widths, self.nested_sites.sites)
        return all(total_cost(cost, counts) <= limit * (1 + RELATIVE_TOLERANCE) for cost, limit in self.caps)


__all__ = [
    "PlanConstraints",
    "Scores",
    "default_align",
    "min_feasible_keep",
    "min_params",
    "min_width",
    "min_widths",
    "select",
]

Scores = Mapping[str, Tensor]  # site name -> one score per unit; higher stays


def select(
    scores: Scores, sites: Sequence[Site], keep: float, constraints: PlanConstraints, *, larger_plan: Plan | None = None
) -> Plan:
    """The plan of the highest scores that keeps at most `keep` of the prunable parameters; see `best_units`."""
    return plan_from_gates(best_units(NestedSites(sites, scores, larger_plan), keep, constraints))


def best_units(nested_sites: NestedSites, keep: float, constraints: PlanConstraints) -> dict[str, Tensor]:
    """The units of highest scores that hold at most `keep` of the prunable parameters: {site: bool [U]}.

    Under `shape.limits`, `keep` says how far these have come (`budget.limits`), and the plan is within all of them.
    A nest may lie within a larger plan of the same shape, and then a plan is maximal inside that.
    Raises `PlanError` with the smallest feasible keep where even the floors are above the target.
    """
    sites = nested_sites.sites
    caps = constraints.limits.cost_limits_at(keep) if constraints.limits else ()
    keep = constraints.limits.params_share_at(keep) if constraints.limits else keep
    target = int(
        keep * prunable_params(sites) * (1 + 1e-12)
    )  # a keep that was computed as a share may be short by rounding
    check_tensor_parallel(sites, constraints)
    lowest = min_params(sites, constraints)
    if target < lowest:
        raise PlanError(
            f"budget.keep {keep:g} is below what is feasible ({_rounded_up(lowest / prunable_params(sites))}) "
            f"for layout {constraints.layout} with budget.align {constraints.align}: "
            "raise budget.keep, or lower budget.align or budget.min_groups"
        )
    room = BudgetTracker(nested_sites, caps)
    if caps and not room.fits(min_widths(nested_sites, constraints)):
        raise PlanError(
            f"not even the smallest plan of layout {constraints.layout} with budget.align {constraints.align} is within all "
            "budgets: raise one of them, or lower budget.align, budget.min_groups or budget.min_share"
        )
    if constraints.layout == "uniform":
        return nested_sites.best_units(uniform_widths(nested_sites, target, constraints, room.fits if caps else None))
    return nested_sites.best_units(_per_layer_widths(nested_sites, target, constraints, room))


def min_params(sites: Sequence[Site], constraints: PlanConstraints) -> int:
    """Prunable parameters of the smallest legal plan."""
    nest = NestedSites(sites)
    return nest.total_params(min_widths(nest, constraints))


def min_widths(nested_sites: NestedSites, constraints: PlanConstraints) -> dict[str, int]:
    """Of the smallest legal plan."""
    if constraints.layout == "uniform":
        return min_uniform_widths(nested_sites, constraints)
    return {site.name: min_width(site, constraints) for site in nested_sites.sites}


def min_feasible_keep(sites: Sequence[Site], constraints: PlanConstraints) -> float:
    """The smallest keep that some legal plan meets."""
    return min_params(sites, constraints) / prunable_params(sites)


def _rounded_up(share: float) -> str:
    return f"{-(-share * 1000 // 1) / 1000:.3f}"


def _per_layer_widths(
    nested_sites: NestedSites, target: int, constraints: PlanConstraints, tracker: BudgetTracker
) -> dict[str, int]:
    widths = min_widths(nested_sites, constraints)
    spent = nested_sites.total_params(widths)
    tracker.start_from(widths)
    # Blocks of one site come in descending score, so taking the best offers first never skips within a site ...
    closed: set[str] = set()
    waiting: dict[str, int] = {}
    for _, place, _, block in _candidate_blocks(nested_sites, widths, constraints):
        site = nested_sites.sites[place]
        if site.name in closed:
            continue
        block += waiting.pop(site.name, 0)
        # Prices only rise as more is opened around or inside, and room only falls: what is closed stays so.
        lanes = nested_sites.open_parent_groups(site, widths)
        price = block * lanes * nested_sites.params_with_children(site, widths)
        if not lanes or spent + price > target:
            closed.add(site.name)  # ... and a site whose block did not fit takes no later, smaller one.
            continue
        if not tracker.try_add(site, block, widths):
            waiting[site.name] = block  # More may cost no more where hardware works in tiles: asked with the next.
            continue
        widths[site.name] += block
        spent += price
    return widths


def _score_ceiling(nested_sites: NestedSites, site: Site, widths: Mapping[str, int]) -> float:
    """The score at which the first unit around a site is offered; what is inside comes no earlier."""
    outer = nested_sites.parent(site)
    if outer is None:
        return math.inf
    return min(
        math.inf if widths[outer.name] else nested_sites.best_score(outer), _score_ceiling(nested_sites, outer, widths)
    )


def _candidate_blocks(
    nested_sites: NestedSites, widths: Mapping[str, int], constraints: PlanConstraints
) -> list[tuple[float, int, int, int]]:
    """(minus mean score, place of the site, width below, size) of each block above `widths`, the best one first.

    The last block of a site takes what is left.
    """
    offers = []
    for place, site in enumerate(nested_sites.sites):
        most, width, size, cap = (
            nested_sites.max_width(site),
            widths[site.name],
            block_size(site, constraints),
            _score_ceiling(nested_sites, site, widths),
        )
        held = torch.zeros(most + 1, dtype=torch.float64)
        torch.cumsum(nested_sites.mean_scores(site)[:most], 0, out=held[1:])
        edges, sums = [*range(width, most, size), most], [*held[width:-1:size].tolist(), float(held[-1])]
        offers += [
            (-min((after - before) / (high - low), cap), place, low, high - low)
            for low, high, before, after in zip(edges, edges[1:], sums, sums[1:], strict=False)
        ]
    return sorted(offers)
