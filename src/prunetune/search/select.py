"""From scores to a plan: deterministic, within every budget, and always of widths that a checkpoint can have.

The units of a site are ranked by score (equal scores by index) and added in blocks: one KV group, or `align` MLP
channels; a site of several groups adds as many in each. What a unit contains is added after the unit, never without it.
A plan is *maximal*: it meets the budgets, and no further block would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.cost.deployment import Cost, total_cost
from prunetune.cost.parameters import prunable_params
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.units import Site
from prunetune.search.nested_sites import NestedSites, SiteWidths
from prunetune.search.plan_rules import PlanConstraints, block_size, check_tensor_parallel, min_width
from prunetune.search.uniform import min_uniform_widths, uniform_widths

Scores = Mapping[str, Tensor]  # site name -> one score per unit [U]; higher ones are kept

RELATIVE_TOLERANCE = 1e-9  # of a limit: sums over many layers are inexact
KEEP_TOLERANCE = 1e-12  # of a keep that was computed as a share of parameters, and may be short by rounding


def select(
    scores: Scores, sites: Sequence[Site], keep: float, constraints: PlanConstraints, *, larger_plan: Plan | None = None
) -> Plan:
    """The plan of the highest scores that keeps at most `keep` of the prunable parameters.

    With a `larger_plan` of the same constraints, only units that it keeps. Under `constraints.limits`, `keep` is a
    point between the dense model and these budgets (see `BudgetLimits`), and the plan meets all of them as they are at
    that point. Raises `PlanError` with the smallest feasible keep if even the smallest legal plan is too large.
    """
    nested_sites, limits = NestedSites(sites, scores, larger_plan), constraints.limits
    cost_limits = limits.cost_limits_at(keep) if limits else ()
    keep = limits.params_share_at(keep) if limits else keep
    target_params = int(keep * prunable_params(sites) * (1 + KEEP_TOLERANCE))
    check_tensor_parallel(sites, constraints)
    lowest = min_params(sites, constraints)
    if target_params < lowest:
        feasible_keep = math.ceil(lowest / prunable_params(sites) * 1000) / 1000
        raise PlanError(
            f"budget.keep {keep:g} is below what is feasible ({feasible_keep:.3f}) for layout {constraints.layout} "
            f"with budget.align {constraints.align}: raise budget.keep, or lower budget.align or budget.min_groups"
        )
    tracker = BudgetTracker(nested_sites, cost_limits)
    if cost_limits and not tracker.fits(min_widths(nested_sites, constraints)):
        raise PlanError(
            f"not even the smallest plan of layout {constraints.layout} with budget.align {constraints.align} is "
            "within all budgets: raise one of them, or lower budget.align, budget.min_groups or budget.min_share"
        )
    if constraints.layout == "uniform":
        fits_limits = tracker.fits if cost_limits else None
        return nested_sites.best_plan(uniform_widths(nested_sites, target_params, constraints, fits_limits))
    return nested_sites.best_plan(_per_layer_widths(nested_sites, target_params, constraints, tracker))


def min_widths(nested_sites: NestedSites, constraints: PlanConstraints) -> dict[str, int]:
    """Widths of the smallest legal plan: {site: units of each open group}."""
    if constraints.layout == "uniform":
        return min_uniform_widths(nested_sites, constraints)
    return {site.name: min_width(site, constraints) for site in nested_sites.sites}


def min_params(sites: Sequence[Site], constraints: PlanConstraints) -> int:
    """Prunable parameters of the smallest legal plan."""
    nested_sites = NestedSites(sites)
    return nested_sites.total_params(min_widths(nested_sites, constraints))


def min_feasible_keep(sites: Sequence[Site], constraints: PlanConstraints) -> float:
    """The smallest keep that some legal plan meets, as a share of the prunable parameters."""
    return min_params(sites, constraints) / prunable_params(sites)


def _per_layer_widths(
    nested_sites: NestedSites, target_params: int, constraints: PlanConstraints, tracker: BudgetTracker
) -> dict[str, int]:
    """Widths of the maximal plan that grows from the smallest by the blocks of highest score: {site: width}."""
    widths = min_widths(nested_sites, constraints)
    params = nested_sites.total_params(widths)
    tracker.start_from(widths)
    closed: set[str] = set()  # sites that grow no more
    deferred: dict[str, int] = {}  # units that a limit refused
    # Blocks of one site come in their order, so the best candidate never leaves out an earlier one of its site.
    for _, site_index, _, block in _candidate_blocks(nested_sites, widths, constraints):
        site = nested_sites.sites[site_index]
        if site.name in closed:
            continue
        block += deferred.pop(site.name, 0)
        groups = nested_sites.open_parent_groups(site, widths)
        block_params = block * groups * nested_sites.params_with_children(site, widths)
        if not groups or params + block_params > target_params:
            # It would not fit later either, since blocks only get larger and the rest of the budget smaller; and no
            # later, smaller block of the site may be added without this one.
            closed.add(site.name)
        elif not tracker.try_add(site, block, widths):
            deferred[site.name] = block  # hardware works in tiles: with the next block it may cost no more
        else:
            widths[site.name] += block
            params += block_params
    return widths


def _candidate_blocks(
    nested_sites: NestedSites, widths: SiteWidths, constraints: PlanConstraints
) -> list[tuple[float, int, int, int]]:
    """(minus mean score, index of the site, width below, units) of each block above these widths, the best one first.

    The last block of a site has the rest of its units. A block ranks no higher than the units around it.
    """
    candidates: list[tuple[float, int, int, int]] = []
    ceilings = {"": math.inf}  # by site: what no block inside it exceeds, so that none comes before the unit around it
    for index, site in enumerate(nested_sites.sites):
        start, max_width, size = widths[site.name], nested_sites.max_width(site), block_size(site, constraints)
        ceiling = ceilings[site.parent]
        ceilings[site.name] = ceiling if start else min(ceiling, nested_sites.best_score(site))
        score_sums = torch.zeros(max_width + 1, dtype=torch.float64)  # of the best n units, n from 0
        torch.cumsum(nested_sites.mean_scores(site)[:max_width], 0, out=score_sums[1:])
        edges = [*range(start, max_width, size), max_width]
        sums = [*score_sums[start:-1:size].tolist(), float(score_sums[-1])]
        candidates += [
            (-min((sum_high - sum_low) / (high - low), ceiling), index, low, high - low)
            for low, high, sum_low, sum_high in zip(edges, edges[1:], sums, sums[1:], strict=False)
        ]
    return sorted(candidates)


class BudgetTracker:
    """Costs of a plan that grows, layer by layer, and whether its next block fits under every (cost, limit)."""

    def __init__(self, nested_sites: NestedSites, cost_limits: Sequence[tuple[Cost, float]]) -> None:
        self.nested_sites, self.cost_limits = nested_sites, tuple(cost_limits)
        self.sites_by_layer: dict[int, list[Site]] = {}
        for site in nested_sites.sites:
            self.sites_by_layer.setdefault(site.layer, []).append(site)
        self.layer_costs: list[dict[int, float]] = []  # of each cost: {layer: cost}
        self.spent: list[float] = []  # of each cost: the total

    def start_from(self, widths: SiteWidths) -> None:
        """Count the costs of these widths."""
        counts = self.nested_sites.kept_unit_counts(widths, self.nested_sites.sites)
        self.layer_costs, self.spent = [], []
        for cost, _ in self.cost_limits:
            by_layer = {layer: cost.layer_cost(layer, counts) for layer in cost.dense_shape.layers}
            self.layer_costs.append(by_layer)
            self.spent.append(cost.fixed_cost + sum(by_layer.values()))

    def try_add(self, site: Site, block: int, widths: SiteWidths) -> bool:
        """Count `block` more units in each open group of the site if that fits; False if a limit forbids it."""
        if not self.cost_limits:
            return True
        wider = {**widths, site.name: widths[site.name] + block}
        counts = self.nested_sites.kept_unit_counts(wider, self.sites_by_layer[site.layer])
        new_costs = [cost.layer_cost(site.layer, counts) for cost, _ in self.cost_limits]
        rows = zip(self.spent, self.layer_costs, new_costs, strict=True)
        spent = [total - by_layer[site.layer] + new for total, by_layer, new in rows]
        if not self._within_limits(spent):
            return False
        self.spent = spent
        for by_layer, new in zip(self.layer_costs, new_costs, strict=True):
            by_layer[site.layer] = new
        return True

    def fits(self, widths: SiteWidths) -> bool:
        """Whether the model of these widths is within every limit."""
        counts = self.nested_sites.kept_unit_counts(widths, self.nested_sites.sites)
        return self._within_limits([total_cost(cost, counts) for cost, _ in self.cost_limits])

    def _within_limits(self, totals: Sequence[float]) -> bool:
        limits = [limit * (1 + RELATIVE_TOLERANCE) for _, limit in self.cost_limits]
        return all(total <= limit for total, limit in zip(totals, limits, strict=True))
