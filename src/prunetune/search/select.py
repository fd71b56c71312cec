"""From scores to a plan: deterministic, within every budget, and always of widths that a checkpoint can have.

The units of a site are ranked by score (equal scores by index) and added in blocks: one KV group, or `align` MLP
channels; a site of several groups adds as many in each. What a unit contains is added after the unit, never without it.
A plan is *maximal*: it meets the budgets, and no further block would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from prunetune.config.quantities import format_amount_rounded_to_limit
from prunetune.cost.budget_limits import BudgetLimit, BudgetLimits
from prunetune.cost.deployment import Cost, total_cost
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.units import Site, prunable_params
from prunetune.search.nested_sites import NestedSites, SiteWidths
from prunetune.search.plan_rules import PlanConstraints, block_size, check_tensor_parallel, min_width
from prunetune.search.uniform import UniformPlanner

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
        planner = UniformPlanner(nested_sites, constraints)
        shapes = list(planner.shapes_within(target_params, tracker.fits if cost_limits else None))
        if not shapes:
            raise PlanError("no uniform shape meets all budgets at once: use layout per-layer, or raise one of them")
        best = max(shapes, key=lambda shape: (planner.weighted_score(shape), planner.total_params(shape)))
        return nested_sites.best_plan(planner.widths_by_site(best))
    # The maximal plan grows from the smallest by the blocks of highest score.
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
    return nested_sites.best_plan(widths)


def min_widths(nested_sites: NestedSites, constraints: PlanConstraints) -> dict[str, int]:
    """Widths of the smallest legal plan: {site: units of each open group}."""
    if constraints.layout == "uniform":
        planner = UniformPlanner(nested_sites, constraints)
        return planner.widths_by_site(min(planner.legal_shapes(), key=planner.total_params))
    return {site.name: min_width(site, constraints) for site in nested_sites.sites}


def min_params(sites: Sequence[Site], constraints: PlanConstraints) -> int:
    """Prunable parameters of the smallest legal plan."""
    nested_sites = NestedSites(sites)
    return nested_sites.total_params(min_widths(nested_sites, constraints))


def min_feasible_keep(sites: Sequence[Site], constraints: PlanConstraints) -> float:
    """The smallest keep that some legal plan meets, as a share of the prunable parameters."""
    return min_params(sites, constraints) / prunable_params(sites)


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


@dataclass(frozen=True)
class Decision:
    """Hard gates of the dense model's units, and their plan once it is final."""

    gates: Mapping[str, Tensor]  # {site: [U]}, each 0 or 1
    plan: Plan | None = None

    @classmethod
    def from_plan(cls, plan: Plan, sites: Sequence[Site], device: torch.device | str = "cpu") -> Self:
        """The gates of a plan, with it."""
        return cls(detach_to(gates_from_plan(plan, sites), device), plan)


def detach_to(values: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """{site: [U]} detached and on a device, in one transfer instead of one per site."""
    return split_like(values, torch.cat([value.detach() for value in values.values()]).to(device))


def split_like(values: Mapping[str, Tensor], joined: Tensor) -> dict[str, Tensor]:
    """A vector over all units, split into {site: [U]} of the same names and lengths."""
    return dict(zip(values, torch.split(joined, [len(value) for value in values.values()]), strict=True))


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
    prices, prices_with_children = _unit_prices(nested_sites, constraints, budgets)
    limits = BudgetLimits(tuple(budgets), requested_keep, 0.0, 0.0, prices, prices_with_children)
    plan = select(uniform_scores(sites), sites, 0.0, replace(constraints, limits=limits))
    feasible_keep = _kept_share(plan, {site.name: site.unit_params for site in sites})
    limits = replace(limits, feasible_keep=feasible_keep, feasible_price_share=_kept_share(plan, prices))
    return replace(constraints, limits=limits)


def _unit_prices(
    nested_sites: NestedSites, constraints: PlanConstraints, budgets: Sequence[BudgetLimit]
) -> tuple[dict[str, float], dict[str, float]]:
    """{site: price of a unit}, without and with all that it contains, as parameters that cost the budgets as much.

    A budget weighs as much as the share of the dense cost that it asks to remove, so one that the dense model meets
    does not count, unless it meets all.
    """
    removals = [max(0.0, 1 - budget.limit / budget.dense_cost) for budget in budgets]
    removals = removals if any(removals) else [1.0] * len(budgets)
    all_params = sum(site.params for site in nested_sites.sites)
    with_children = {site.name: 0.0 for site in nested_sites.sites}
    for budget, removal in zip(budgets, removals, strict=True):
        cost = max(budget.costs, key=lambda cost: total_cost(cost, cost.dense_shape.dense_counts()))
        unit_costs = {}  # mean cost of a unit with all that it contains, between the dense width and the least
        for site in nested_sites.sites:
            layer_sites = [other for other in nested_sites.sites if other.layer == site.layer]
            widths = {other.name: other.units_per_group for other in layer_sites}
            unprotected = replace(constraints, protected=frozenset())
            least = 0 if site.kind.is_whole_block else min(min_width(site, unprotected), site.units_per_group - 1)
            dense = nested_sites.kept_unit_counts(widths, layer_sites)
            narrow = nested_sites.kept_unit_counts({**widths, site.name: least}, layer_sites)
            saved = cost.layer_cost(site.layer, dense) - cost.layer_cost(site.layer, narrow)
            unit_costs[site.name] = saved / (dense[site.name] - narrow[site.name])
        prunable_cost = sum(site.units * unit_costs[site.name] for site in nested_sites.sites if not site.parent)
        for name, unit_cost in unit_costs.items():
            with_children[name] += (
                removal / sum(removals) * unit_cost * all_params / prunable_cost if prunable_cost else 0.0
            )
    total_params = {site.name: site.total_unit_params for site in nested_sites.sites}
    prices_with_children = {
        name: max(price, MIN_PRICE * total_params[name], MIN_PRICE) for name, price in with_children.items()
    }
    prices = {}  # of units without the units that they contain
    for site in nested_sites.sites:
        children = nested_sites.child_sites.get(site.name, ())
        inside = sum(child.units // site.units * prices_with_children[child.name] for child in children)
        prices[site.name] = max(prices_with_children[site.name] - inside, MIN_PRICE)
    return prices, prices_with_children


def _kept_share(plan: Plan, prices: Mapping[str, float]) -> float:
    """Price of the kept units over that of all units."""
    kept = sum(len(units) * prices[site] for site, units in plan.kept.items())
    return float(kept / sum(count * prices[site] for site, count in plan.units.items()))
