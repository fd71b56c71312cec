"""Laws of nested plans: each keeps only units of the next larger one, is on its budget, and is maximal inside that."""

from __future__ import annotations

import itertools

import pytest
import torch

from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site, dense_plan, kept_params, prunable_params
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints, block_size, min_width
from prunetune.search.select import min_feasible_keep, select
from support.geometries import GEOMETRIES, geometry
from support.models import tiny
from support.nested import both_layouts, constraints_for, every_family, random_scores, sites_of

SEEDS = 8


def chain(sites: tuple[Site, ...], constraints: PlanConstraints, seed: int, count: int = 4) -> list[tuple[float, Plan]]:
    """Plans from near dense down to the smallest feasible one."""
    scores, low = random_scores(sites, seed), min_feasible_keep(sites, constraints)
    plans: list[tuple[float, Plan]] = []
    for index in range(count):
        keep = low + (0.95 - low) * (1 - index / (count - 1)) ** 1.5
        plans.append((keep, select(scores, sites, keep, constraints, larger_plan=plans[-1][1] if plans else None)))
    return plans


def assert_nested(sites: tuple[Site, ...], plans: list[tuple[float, Plan]]) -> None:
    for (_, larger), (_, smaller) in itertools.pairwise(plans):
        assert all(set(smaller.kept[site.name]) <= set(larger.kept[site.name]) for site in sites)
    for keep, plan in plans:
        assert kept_params(sites, plan) <= keep * prunable_params(sites) * (1 + 1e-12)
        gates_from_plan(plan, sites)  # raises for a plan that cannot be cut


@every_family
@both_layouts
def test_each_plan_is_inside_the_next_larger_one(family: str, layout: str) -> None:
    sites = sites_of(family, layout == "uniform")
    for seed in range(SEEDS):
        assert_nested(sites, chain(sites, constraints_for(layout), seed))


@pytest.mark.parametrize("name", GEOMETRIES)
@both_layouts
def test_each_plan_is_maximal_inside_the_larger_one(name: str, layout: str) -> None:
    sites, align, legal = geometry(name)
    constraints = PlanConstraints(layout, align, 0, lambda groups: groups in legal)
    for seed in range(SEEDS):
        plans = chain(sites, constraints, seed)
        assert_nested(sites, plans)
        if layout == "per-layer":
            for (_, larger), (keep, smaller) in itertools.pairwise(plans):
                assert_no_block_fits(
                    sites, constraints, larger, smaller, int(keep * prunable_params(sites) * (1 + 1e-12))
                )


def assert_no_block_fits(
    sites: tuple[Site, ...], constraints: PlanConstraints, larger: Plan, smaller: Plan, target: int
) -> None:
    left = target - kept_params(sites, smaller)
    for site in sites:
        more = len(larger.kept[site.name]) - len(smaller.kept[site.name])
        assert not more or min(more, block_size(site, constraints)) * site.unit_params > left
        assert len(smaller.kept[site.name]) >= min_width(site, constraints)


@both_layouts
def test_dense_larger_plan_gives_the_same_plan(layout: str) -> None:
    sites = sites_of("qwen3", layout == "uniform")
    for seed in range(SEEDS):
        scores = random_scores(sites, seed)
        plain = select(scores, sites, 0.6, constraints_for(layout))
        assert select(scores, sites, 0.6, constraints_for(layout), larger_plan=dense_plan(sites)) == plain


@every_family
@both_layouts
def test_pruned_units_of_the_larger_plan_are_never_kept(family: str, layout: str) -> None:
    """Also with a larger plan that was selected by other scores."""
    sites, constraints = sites_of(family, layout == "uniform"), constraints_for(layout)
    for seed in range(SEEDS):
        larger = select(random_scores(sites, seed), sites, 0.7, constraints)
        smaller = select(random_scores(sites, seed + 100), sites, 0.5, constraints, larger_plan=larger)
        assert_nested(sites, [(0.7, larger), (0.5, smaller)])


def test_pruned_units_of_the_larger_plan_rank_last() -> None:
    site = find_sites(tiny("qwen3", groups=2, ratio=3, layers=1, hidden_size=48), ["query-heads"])
    scores = {site[0].name: torch.tensor([2.0, 1.0, 3.0, 6.0, 5.0, 4.0])}
    for kept, order in (((1, 5), [[1, 2, 0], [5, 3, 4]]), ((), [[2, 0, 1], [3, 4, 5]])):
        nested_sites = NestedSites(site, scores, Plan({site[0].name: kept}, {site[0].name: 6}))
        assert nested_sites.ranked_units[site[0].name].tolist() == order


def test_infeasible_keep_inside_a_larger_plan_is_refused() -> None:
    sites = sites_of("qwen3", False)
    scores, constraints = random_scores(sites, 0), constraints_for("per-layer")
    larger = select(scores, sites, 0.5, constraints)
    with pytest.raises(PlanError, match="below what is feasible"):
        select(scores, sites, 0.9 * min_feasible_keep(sites, constraints), constraints, larger_plan=larger)
