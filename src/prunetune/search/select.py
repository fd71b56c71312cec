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
from prunetune.pruning.remaining_sites import remaining_sites
from prunetune.pruning.units import Site, UnitKind, hidden_site
from prunetune.search.nested_sites import NestedSites, SiteWidths
from prunetune.search.plan_rules import (
    PlanConstraints,
    block_size,
    budget_params,
    budget_share,
    check_tensor_parallel,
    min_width,
)
from prunetune.search.uniform import UniformPlanner

Scores = Mapping[str, Tensor]  # site name -> one score per unit [U]; higher ones are kept

RELATIVE_TOLERANCE = 1e-9  # of a limit: sums over many layers are inexact
KEEP_TOLERANCE = 1e-12  # of a keep that was computed as a share of parameters, and may be short by rounding


def select(
    scores: Scores, sites: Sequence[Site], keep: float, constraints: PlanConstraints, *, larger_plan: Plan | None = None
) -> Plan:
    """The plan of the highest scores that keeps at most `keep` of the parameters that the budget counts.

    With a `larger_plan` of the same constraints, only units that it keeps. Under `constraints.limits`, `keep` is a
    point between the dense model and these budgets (see `BudgetLimits`), and the plan meets all of them as they are at
    that point. If hidden channels are units, the number of them is taken whose best plan keeps the most importance.
    Raises `PlanError` with the smallest feasible keep if even the smallest legal plan is too large.
    """
    limits, hidden = constraints.limits, hidden_site(sites)
    cost_limits = limits.cost_limits_at(keep) if limits else ()
    keep = limits.params_share_at(keep) if limits else keep
    dense = {site.name: site.units for site in sites}
    dense_params = constraints.original_params or budget_params(sites, dense, constraints)
    target_params = int(keep * dense_params * (1 + KEEP_TOLERANCE))
    check_tensor_parallel(sites, constraints)
    lowest = budget_params(sites, min_counts(sites, constraints), constraints)
    if target_params < lowest:
        feasible_keep = math.ceil(lowest / dense_params * 1000) / 1000
        raise PlanError(
            f"budget.keep {keep:g} is below what is feasible ({feasible_keep:.3f}) for layout {constraints.layout} "
            f"with budget.align {constraints.align}: raise budget.keep, or lower budget.align or budget.min_groups"
        )
    nested_sites = NestedSites(without_hidden(sites), scores, larger_plan)
    if hidden is None:
        reserved = budget_params(sites, dict.fromkeys(dense, 0), constraints)
        tracker = BudgetTracker(nested_sites, cost_limits)
        return nested_sites.best_plan(_best_widths(nested_sites, target_params - reserved, tracker, constraints))
    channels = NestedSites([hidden], scores, larger_plan)
    current = remaining_sites(sites, larger_plan) if larger_plan else sites
    best, most = None, -math.inf
    widest = channels.max_width(hidden)
    narrower = range(min_width(hidden, constraints), widest, block_size(hidden, constraints))
    for width in (widest, *reversed(narrower)):
        narrowed = nested_sites.with_sites(without_hidden(sites, width))
        reserved = budget_params(sites, dict.fromkeys(dense, 0) | {hidden.name: width}, constraints)
        tracker = BudgetTracker(narrowed, cost_limits, {hidden.name: width})
        if target_params - reserved < narrowed.total_params(min_widths(narrowed, constraints)):
            continue
        try:
            widths = _best_widths(narrowed, target_params - reserved, tracker, constraints)
        except PlanError:  # a limit on another cost, which fewer channels may meet
            continue
        kept_units = channels.best_units({hidden.name: width}) | narrowed.best_units(widths)
        if (kept := _kept_importance(scores, current, kept_units, constraints)) > most:
            best, most = (width, widths), kept
    if best is None:
        raise PlanError("no number of hidden channels meets all budgets at once: raise one of them")
    of_channels, of_others = channels.best_plan({hidden.name: best[0]}), nested_sites.best_plan(best[1])
    return Plan({**of_channels.kept, **of_others.kept}, {**of_channels.units, **of_others.units})


def _best_widths(
    nested_sites: NestedSites, target_params: int, tracker: "BudgetTracker", constraints: PlanConstraints
) -> SiteWidths:
    """The widths of the highest scores within a number of parameters and all limits on costs."""
    if tracker.cost_limits and not tracker.fits(min_widths(nested_sites, constraints)):
        raise PlanError(
            f"not even the smallest plan of layout {constraints.layout} with budget.align {constraints.align} is "
            "within all budgets: raise one of them, or lower budget.align, budget.min_groups or budget.min_share"
        )
    if not nested_sites.sites:
        return {}
    if constraints.layout == "uniform":
        planner = UniformPlanner(nested_sites, constraints)
        shapes = list(planner.shapes_within(target_params, tracker.fits if tracker.cost_limits else None))
        if not shapes:
            raise PlanError("no uniform shape meets all budgets at once: use layout per-layer, or raise one of them")
        best = max(shapes, key=lambda shape: (planner.weighted_score(shape), planner.total_params(shape)))
        return planner.widths_by_site(best)
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
    return widths


def _kept_importance(
    scores: Scores, sites: Sequence[Site], kept_units: Mapping[str, Tensor], constraints: PlanConstraints
) -> float:
    """The sum over kept units of score (above the lowest negative one) times price, none above the unit around it."""
    total, ceilings = 0.0, {"": math.inf}
    lowest = min(0.0, *(float(values.min()) for values in scores.values()))
    prices = (constraints.limits.prices if constraints.limits else None) or {}
    for site in sites:
        values = scores[site.name].detach().double().cpu() - lowest
        ceilings[site.name] = min(ceilings[site.parent], float(values.max()))
        crosses_all = site.kind is UnitKind.HIDDEN_CHANNEL
        price = constraints.unit_price(site) if crosses_all else prices.get(site.name, site.unit_params)
        total += float((values.clamp(max=ceilings[site.parent]) * kept_units[site.name]).sum()) * price
    return total


def without_hidden(sites: Sequence[Site], width: int | None = None) -> tuple[Site, ...]:
    """The sites but that of hidden channels; with a `width`, as large as they are with so many of these."""
    hidden = hidden_site(sites)
    if hidden is None:
        return tuple(sites)
    removed = 0 if width is None else hidden.units - width
    narrowed = (replace(site, unit_params=site.unit_params - removed * site.hidden_params) for site in sites)
    return tuple(site for site in narrowed if site.name != hidden.name)


def min_widths(nested_sites: NestedSites, constraints: PlanConstraints) -> dict[str, int]:
    """Widths of the smallest legal plan, without hidden channels: {site: units of each open group}."""
    if constraints.layout == "uniform" and nested_sites.sites:
        planner = UniformPlanner(nested_sites, constraints)
        return planner.widths_by_site(min(planner.legal_shapes(), key=planner.total_params))
    return {site.name: min_width(site, constraints) for site in nested_sites.sites}


def min_counts(sites: Sequence[Site], constraints: PlanConstraints) -> dict[str, int]:
    """{site: units} of the smallest legal plan."""
    hidden = hidden_site(sites)
    channels = {} if hidden is None else {hidden.name: min_width(hidden, constraints)}
    nested_sites = NestedSites(without_hidden(sites, next(iter(channels.values()), None)))
    counts = nested_sites.kept_unit_counts(min_widths(nested_sites, constraints), nested_sites.sites)
    return channels | counts


def min_params(sites: Sequence[Site], constraints: PlanConstraints) -> int:
    """Parameters of the smallest legal plan, as the budget counts them."""
    return budget_params(sites, min_counts(sites, constraints), constraints)


def min_feasible_keep(sites: Sequence[Site], constraints: PlanConstraints) -> float:
    """The smallest keep that some legal plan meets, as a share of the parameters that the budget counts."""
    return budget_share(sites, min_counts(sites, constraints), constraints)


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

    def __init__(
        self,
        nested_sites: NestedSites,
        cost_limits: Sequence[tuple[Cost, float]],
        hidden_counts: Mapping[str, int] | None = None,  # the hidden channels of all these plans, where they are units
    ) -> None:
        self.nested_sites, self.cost_limits = nested_sites, tuple(cost_limits)
        self.hidden_counts = hidden_counts or {}
        self.sites_by_layer: dict[int, list[Site]] = {}
        for site in nested_sites.sites:
            self.sites_by_layer.setdefault(site.layer, []).append(site)
        self.layer_costs: list[dict[int, float]] = []  # of each cost: {layer: cost}
        self.spent: list[float] = []  # of each cost: the total

    def start_from(self, widths: SiteWidths) -> None:
        """Count the costs of these widths."""
        counts = self._counts(widths, self.nested_sites.sites)
        self.layer_costs, self.spent = [], []
        for cost, _ in self.cost_limits:
            by_layer = {layer: cost.layer_cost(layer, counts) for layer in cost.dense_shape.layers}
            self.layer_costs.append(by_layer)
            self.spent.append(cost.fixed_cost(counts) + sum(by_layer.values()))

    def try_add(self, site: Site, block: int, widths: SiteWidths) -> bool:
        """Count `block` more units in each open group of the site if that fits; False if a limit forbids it."""
        if not self.cost_limits:
            return True
        wider = {**widths, site.name: widths[site.name] + block}
        counts = self._counts(wider, self.sites_by_layer[site.layer])
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
        counts = self._counts(widths, self.nested_sites.sites)
        return self._within_limits([total_cost(cost, counts) for cost, _ in self.cost_limits])

    def _counts(self, widths: SiteWidths, sites: Sequence[Site]) -> dict[str, int]:
        return {**self.nested_sites.kept_unit_counts(widths, sites), **self.hidden_counts}

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
    lowest = min_counts(sites, constraints)
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
    prices, prices_with_children = _unit_prices(NestedSites(sites), constraints, budgets)
    limits = BudgetLimits(tuple(budgets), requested_keep, 0.0, 0.0, prices, prices_with_children)
    plan = select(uniform_scores(sites), sites, 0.0, replace(constraints, limits=limits))
    feasible_keep = budget_share(sites, plan.widths(), constraints)
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
    hidden = hidden_site(nested_sites.sites)
    hidden_counts = {hidden.name: hidden.units} if hidden else {}
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
            if site.kind is UnitKind.HIDDEN_CHANNEL:
                counts = {other.name: other.units for other in nested_sites.sites}
                saved = total_cost(cost, counts) - total_cost(cost, {**counts, **narrow})
            else:
                dense, narrow = hidden_counts | dense, hidden_counts | narrow
                saved = cost.layer_cost(site.layer, dense) - cost.layer_cost(site.layer, narrow)
            unit_costs[site.name] = saved / (dense[site.name] - narrow[site.name])
        outermost = [site for site in nested_sites.sites if not site.parent and site is not hidden]
        prunable_cost = sum(site.units * unit_costs[site.name] for site in outermost or nested_sites.sites)
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
