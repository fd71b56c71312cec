"""Law: plans and gates are those of a reference in plain Python lists, to the bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from prunetune.config.quantities import Amount
from prunetune.config.recipe import WorkloadConfig, from_mapping
from prunetune.cost.budget_limits import make_budget_limits
from prunetune.cost.layer_shapes import model_shape
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site, prunable_params
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints, block_size
from prunetune.search.searcher import Searcher
from prunetune.search.select import BudgetTracker, min_feasible_keep, min_widths, select, with_limits
from prunetune.search.uniform import UniformPlanner
from support.models import tiny
from support.nested import both_layouts, constraints_for, every_family, sites_of

SEEDS = 8
BOUNDS = ({}, {"min_groups": 2, "min_queries": 2}, {"min_share": 0.5, "protected": frozenset({1, 3})})
Scores = Mapping[str, Tensor]


def drawn(sites: tuple[Site, ...], seed: int) -> dict[str, Tensor]:
    """Random scores: all different, few different ones, next to equal ones, zeros of both signs."""
    rng = torch.Generator().manual_seed(seed)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in sites}
    change = (lambda x: x, torch.round, lambda x: 0.1 + 1e-7 * x.round(), lambda x: 0.0 * x)[seed % 4]
    return {name: change(values) for name, values in scores.items()}


class ReferenceSearch:
    """Selection in plain lists, one unit after the other."""

    def __init__(self, sites: tuple[Site, ...], scores: Scores, larger_plan: Plan | None) -> None:
        self.sites, self.scores, self.nested_sites = sites, scores, NestedSites(sites, None, larger_plan)
        self.order = {site.name: self.rank_groups(site, larger_plan) for site in sites}

    def rank_groups(self, site: Site, larger_plan: Plan | None) -> list[list[int]]:
        """The units of each group: first those of the larger plan, then by score, then by index."""
        kept, values = (
            set(larger_plan.kept[site.name] if larger_plan else range(site.units)),
            self.scores[site.name].tolist(),
        )
        groups = [
            range(group * site.units_per_group, (group + 1) * site.units_per_group)
            for group in range(site.parent_groups)
        ]
        return [sorted(group, key=lambda unit: (unit not in kept, -values[unit], unit)) for group in groups]

    def ranked(self, site: Site) -> Tensor:
        """Scores by rank: [groups, units of a group]."""
        return torch.stack([self.scores[site.name][group] for group in self.order[site.name]])

    def mean(self, site: Site) -> list[float]:
        """Mean over groups of the units of each rank."""
        means: list[float] = self.ranked(site).mean(0).double().tolist()
        return means

    def cap(self, site: Site, widths: Mapping[str, int]) -> float:
        """The highest score of a block: that of the unit around it, if none is kept yet."""
        outer = self.nested_sites.parent(site)
        if outer is None:
            return math.inf
        return min(math.inf if widths[outer.name] else self.mean(outer)[0], self.cap(outer, widths))

    def per_layer(self, target: int, constraints: PlanConstraints, tracker: BudgetTracker) -> dict[str, int]:
        """Widths of the layout per-layer."""
        widths, candidates = min_widths(self.nested_sites, constraints), []
        for index, site in enumerate(self.sites):
            max_width, cap = self.nested_sites.max_width(site), self.cap(site, widths)
            sums = [0.0, *itertools.accumulate(self.mean(site))]
            for low, high in itertools.pairwise(
                [*range(widths[site.name], max_width, block_size(site, constraints)), max_width]
            ):
                candidates.append((-min((sums[high] - sums[low]) / (high - low), cap), index, low, high - low))
        tracker.start_from(widths)
        closed, deferred = set[int](), dict[int, int]()
        for _, index, _, block in sorted(candidates):
            site = self.sites[index]
            wider = {**widths, site.name: widths[site.name] + block + deferred.get(index, 0)}
            price = self.nested_sites.total_params(wider)
            if index in closed or price == self.nested_sites.total_params(widths) or price > target:
                closed.add(index)
            elif tracker.try_add(site, wider[site.name] - widths[site.name], widths):
                widths, deferred[index] = wider, 0
            else:
                deferred[index] = wider[site.name] - widths[site.name]
        return widths

    def uniform(self, target: int, constraints: PlanConstraints, tracker: BudgetTracker) -> dict[str, int]:
        """Widths of the layout uniform: of the shapes that fit, the one of the highest score."""
        nested_sites, first = NestedSites(self.sites, self.scores), self.nested_sites.first_unit
        nested_sites.max_widths = self.nested_sites.max_widths
        nested_sites.ranked_scores = {site.name: self.ranked(site).double() for site in self.sites}
        nested_sites.ranked_units = {name: torch.tensor(groups) + first[name] for name, groups in self.order.items()}
        scored = UniformPlanner(nested_sites, constraints)
        fitting = scored.shapes_within(target, tracker.fits)
        return scored.widths_by_site(
            max(fitting, key=lambda shape: (scored.weighted_score(shape), scored.total_params(shape)))
        )

    def plan(self, keep: float, constraints: PlanConstraints) -> Plan:
        """The plan that `select` should return."""
        tracker = BudgetTracker(
            self.nested_sites, constraints.limits.cost_limits_at(keep) if constraints.limits else ()
        )
        share = constraints.limits.params_share_at(keep) if constraints.limits else keep
        find = self.uniform if constraints.layout == "uniform" else self.per_layer
        widths, kept = (
            find(int(share * prunable_params(self.sites) * (1 + 1e-12)), constraints, tracker),
            dict[str, tuple[int, ...]](),
        )
        for site in self.sites:
            outer = self.nested_sites.parent(site)
            is_open = site.open_parent_groups(kept[outer.name] if outer else None, outer.units if outer else 1)
            best = [unit for group in is_open for unit in self.order[site.name][group][: widths[site.name]]]
            kept[site.name] = tuple(sorted(best))
        return Plan(kept, {site.name: site.units for site in self.sites})


def constraints_of(sites: tuple[Site, ...], family: str, layout: str, seed: int) -> PlanConstraints:
    """Constraints with other bounds for each seed, and a memory budget for some."""
    constraints = constraints_for(layout, **BOUNDS[seed % 3])
    if seed % 4 < 2:
        return constraints
    anatomy = model_shape(tiny(family, layers=5, groups=3, ratio=3, hidden_size=72), sites)
    return with_limits(
        constraints,
        sites,
        make_budget_limits({"memory": Amount.parse("0.8", "memory")}, anatomy, WorkloadConfig()),
        1.0,
    )


def assert_equals_reference(
    sites: tuple[Site, ...], constraints: PlanConstraints, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, low = drawn(sites, seed), min_feasible_keep(sites, constraints)
    keep = low + (1 - low) * (seed % 5 + 1) / 6
    plan = select(scores, sites, keep, constraints)
    assert plan == ReferenceSearch(sites, scores, None).plan(keep, constraints)
    other_scores, smaller_keep = drawn(sites, seed + 1), low + (keep - low) / 2
    if constraints.limits is None:
        nested_plan = select(other_scores, sites, smaller_keep, constraints, larger_plan=plan)
        assert nested_plan == ReferenceSearch(sites, other_scores, plan).plan(smaller_keep, constraints)
    values = {"layout": constraints.layout, "budget": {"keep": keep}}
    searcher = Searcher(sites, constraints, from_mapping(values), torch.device("cpu"))
    monkeypatch.setattr(searcher, "logits", lambda: scores)
    assert searcher.final_decision().plan == plan


@every_family
@both_layouts
@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_kind_of_unit_equals_the_reference(
    family: str, layout: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = sites_of(family, layout == "uniform")
    assert_equals_reference(sites, constraints_of(sites, family, layout, seed), seed, monkeypatch)


@both_layouts
@pytest.mark.parametrize("seed", range(SEEDS))
def test_default_units_equal_the_reference_where_sums_round(
    layout: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = find_sites(tiny("llama", intermediate_size=1000, layers=4))
    assert_equals_reference(sites, PlanConstraints(layout, 32), seed, monkeypatch)
