"""Laws of plans over nested sites: on budget, maximal, above every bound, no unit kept inside a pruned one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import ConfigError, PlanError
from prunetune.pipeline.plan_constraints import make_plan_constraints
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site, UnitKind, effective_gates, kept_params, kept_share, prunable_params
from prunetune.search.plan_rules import default_align
from prunetune.search.searcher import Searcher
from prunetune.search.select import min_feasible_keep, select
from support.models import tiny
from support.nested import ALIGN, FAMILIES, both_layouts, constraints_for, every_family, random_scores, sites_of


def cases(family: str, layout: str, count: int = 12, **bounds: Any) -> Iterator[tuple[tuple[Site, ...], float, Plan]]:
    sites, constraints = sites_of(family, layout == "uniform"), constraints_for(layout, **bounds)
    low = min_feasible_keep(sites, constraints)
    for seed in range(count):
        keep = low + (1 - low) * (seed / count) ** 2
        yield sites, keep, select(random_scores(sites, seed), sites, keep, constraints)


def widths_of(plan: Plan, sites: tuple[Site, ...]) -> dict[str, int]:
    """{site: units of each open group}; 0 for a site without open groups."""
    widths = {}
    for site in sites:
        groups = {unit // site.units_per_group for unit in plan.kept[site.name]}
        widths[site.name] = len(plan.kept[site.name]) // max(1, len(groups))
    return widths


@every_family
@both_layouts
def test_plan_is_on_budget_nested_and_survives_json(family: str, layout: str) -> None:
    for sites, keep, plan in cases(family, layout):
        assert kept_params(sites, plan) <= keep * prunable_params(sites) * (1 + 1e-12)
        gates = gates_from_plan(plan, sites)  # raises for units inside pruned ones, and for groups of different width
        assert all(torch.equal(gate, gates[name]) for name, gate in effective_gates(gates, sites).items())
        assert float(kept_share(gates, sites)) == pytest.approx(kept_params(sites, plan) / prunable_params(sites))
        assert Plan.from_json(plan.to_json()) == plan


def least_width(site: Site) -> int:
    """Units of each group in a block, head or expert that is opened: a block or layer is opened empty."""
    if site.kind.is_channel:
        return ALIGN
    return 0 if site.kind.is_whole_block else max(site.min_units_per_group, int(site.kind is UnitKind.QUERY_HEAD))


def wider(plan: Plan, sites: tuple[Site, ...], wanted: Collection[str]) -> Plan:
    """The plan with one block more in every open group of the wanted sites.

    New units hold as many units of the sites inside them as others do, or the least where there are no others.
    """
    by_name, widths, kept = {site.name: site for site in sites}, widths_of(plan, sites), dict(plan.kept)
    for site in sites:  # outer ones first
        block = (ALIGN if site.kind.is_channel else 1) if site.name in wanted else 0
        count = min((widths[site.name] if plan.kept[site.name] else 0) + block, site.units_per_group)
        parent, kept_before, units = by_name.get(site.parent), set(plan.kept[site.name]), []
        for group in site.open_parent_groups(kept[parent.name] if parent else None, parent.units if parent else 1):
            numbers = range(group * site.units_per_group, (group + 1) * site.units_per_group)
            ranked = sorted(numbers, key=lambda unit: unit not in kept_before)
            units += ranked[: count or (0 if parent and plan.kept[parent.name] else least_width(site))]
        kept[site.name] = tuple(sorted(units))
    return Plan(kept, plan.units)


@every_family
def test_no_further_block_fits(family: str) -> None:
    """No site can be one block wider, and no pruned block or layer fits at its least width."""
    for sites, keep, plan in cases(family, "per-layer"):
        params_left = keep * prunable_params(sites) - kept_params(sites, plan)
        for site in sites:
            layer = tuple(other for other in sites if other.layer == site.layer)
            more = wider(plan, layer, {site.name})
            assert more == plan or kept_params(layer, more) - kept_params(layer, plan) > params_left, site.name


def test_plan_keeps_the_parameters_of_the_model_that_it_leaves() -> None:
    """So the parameters of a wider plan are those of a real model."""
    for family in ("qwen3", "mixtral"):
        model = tiny(family, layers=5, groups=3, ratio=3, hidden_size=72)
        for sites, _, plan in list(cases(family, "per-layer", count=3))[1:]:
            plans = [plan, wider(plan, sites, {sites[0].name, sites[-1].name})]
            removed = [params_of(model) - params_of(cut(copy.deepcopy(model), one, sites=sites)) for one in plans]
            assert removed == [prunable_params(sites) - kept_params(sites, one) for one in plans]


def params_of(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@every_family
def test_uniform_layers_are_equal_and_no_wider_block_fits(family: str) -> None:
    for sites, keep, plan in cases(family, "uniform", count=8):
        widths = widths_of(plan, sites)
        kept_layers = {site.layer for site in sites if site.kind is UnitKind.LAYER and plan.kept[site.name]}
        shapes = {(site.kind, widths[site.name]) for site in sites if site.layer in kept_layers}
        assert len(shapes) == len({site.kind for site in sites})
        for kind in {site.kind for site in sites} - {UnitKind.LAYER}:
            alike = {site.name for site in sites if site.kind is kind and site.layer in kept_layers}
            more = wider(plan, sites, alike)
            assert more == plan or kept_params(sites, more) > keep * prunable_params(sites), kind


@both_layouts
def test_keep_of_one_keeps_every_unit(layout: str) -> None:
    for family in FAMILIES:
        sites = sites_of(family, layout == "uniform")
        plan = select(random_scores(sites, 0), sites, 1.0, constraints_for(layout))
        assert all(len(plan.kept[site.name]) == site.units for site in sites)


def test_layers_of_lowest_score_are_pruned() -> None:
    sites = find_sites(tiny("qwen3", layers=5), ["layers"])
    scores = {site.name: torch.tensor([value]) for site, value in zip(sites, (-9.0, 3.0, 1.0, 2.0, 4.0), strict=True)}
    for layout in ("per-layer", "uniform"):
        plan = select(scores, sites, 0.6, constraints_for(layout))
        kept = [site.layer for site in sites if plan.kept[site.name]]
        assert kept == [0, 1, 4], "the first layer of its type is kept whatever it scores"


def test_each_group_keeps_its_best_heads() -> None:
    site = find_sites(tiny("qwen3", groups=2, ratio=3, layers=1, hidden_size=48), ["query-heads"])
    scores = {site[0].name: torch.tensor([1.0, 3.0, 2.0, 9.0, 0.0, 8.0])}
    plan = select(scores, site, 0.7, constraints_for("per-layer"))
    assert plan.kept[site[0].name] == (1, 2, 3, 5)


def test_plans_keep_minimum_widths_and_protected_layers() -> None:
    bounds = {"min_groups": 2, "min_queries": 2, "min_experts": 3, "min_share": 0.5, "protected": frozenset({1, 3})}
    for family in ("mixtral", "qwen3"):
        for sites, _, plan in cases(family, "per-layer", **bounds):
            widths = widths_of(plan, sites)
            closed = {site.layer for site in sites if site.kind is UnitKind.LAYER and not plan.kept[site.name]}
            assert not closed & {1, 3}
            for site in sites:
                if site.layer in (1, 3):
                    assert len(plan.kept[site.name]) == site.units
                elif widths[site.name] and not site.kind.is_whole_block:
                    assert widths[site.name] >= 0.5 * site.units_per_group
                    assert widths[site.name] >= {"attention": 2, "query-heads": 2, "experts": 3}.get(site.kind, 0)
    for sites, _, plan in cases("qwen3", "uniform", protected=frozenset({1, 3})):
        assert all(plan.kept[site.name] for site in sites if site.kind is UnitKind.LAYER and site.layer in (1, 3))


def test_at_least_the_experts_of_a_token_are_kept() -> None:
    sites = find_sites(tiny("mixtral", num_experts_per_tok=3), ["experts"])
    plan = select(
        random_scores(sites, 0),
        sites,
        min_feasible_keep(sites, constraints_for("per-layer")),
        constraints_for("per-layer"),
    )
    assert {len(kept) for kept in plan.kept.values()} == {3}


def test_expert_widths_are_multiples_of_eight() -> None:
    sites = find_sites(tiny("mixtral", intermediate_size=40), ["expert-channels"])
    assert default_align(sites) == 8
    with pytest.raises(ConfigError, match=r"budget\.align 12 does not fit expert-channels.*set it to 8"):
        make_plan_constraints(recipe(align=12, units=["expert-channels"]), sites, tiny("mixtral").config)


def recipe(layout: str = "per-layer", **budget: Any) -> RunConfig:
    return from_mapping({"layout": layout, "budget": budget})


@pytest.mark.parametrize("text", ["x", "3-1", "1-", "-1", "1.5", "0--2"])
def test_malformed_protect_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no layer and no range"):
        recipe(protect=text).budget.protected_layers()


def test_protect_and_units_that_do_not_exist_are_refused() -> None:
    assert recipe(protect="0-1, 29").budget.protected_layers() == {0, 1, 29}
    model = tiny("llama")
    with pytest.raises(ConfigError, match="names layer 3, and "):
        make_plan_constraints(recipe(protect="0-3"), find_sites(model), model.config)
    with pytest.raises(ConfigError, match=r"add layers to budget\.units, or use layout per-layer"):
        make_plan_constraints(recipe("uniform", protect="0"), find_sites(model), model.config)
    with pytest.raises(ConfigError, match="nothing could go"):
        recipe(units=[])
    with pytest.raises(ConfigError, match="did you mean experts"):
        recipe(units=["expert"])


@both_layouts
def test_search_has_gradients_for_every_kind_of_unit(layout: str) -> None:
    sites = sites_of("mixtral", layout == "uniform")
    config = from_mapping({"layout": layout, "budget": {"keep": 0.6}})
    searcher = Searcher(sites, constraints_for(layout), config, torch.device("cpu"))
    drawn = searcher.sample(1)
    torch.cat(list(drawn.values())).square().sum().backward()
    assert all(parameter.grad is not None for parameter in searcher.generator.parameters())
    decision = searcher.final_decision()
    assert decision.plan is not None
    assert kept_params(sites, decision.plan) <= 0.6 * prunable_params(sites)


def test_infeasible_keep_is_refused() -> None:
    sites = sites_of("mixtral", False)
    with pytest.raises(PlanError, match="below what is feasible"):
        select(random_scores(sites, 0), sites, 0.001, constraints_for("per-layer"))
