"""Laws: a plan is on budget, maximal, aligned, above its least widths, deterministic, and has the best scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from prunetune.cost.budget_limits import BudgetLimit, BudgetLimits
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.errors import PlanError
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site, UnitKind, dense_plan, kept_params, prunable_params
from prunetune.search.plan_rules import PlanConstraints, default_align, min_width
from prunetune.search.select import min_feasible_keep, min_params, select
from support.geometries import GEOMETRIES, build_sites, geometry
from support.models import tiny

Scores = dict[str, Tensor]
EPSILON = 1e-9  # scores of blocks that differ by less are equal but for rounding


def constraints_for(name: str, layout: str, min_groups: int = 0) -> PlanConstraints:
    _, align, legal = geometry(name)
    return PlanConstraints(layout, align, min_groups, lambda groups: groups in legal)


def random_scores(sites: tuple[Site, ...], seed: int) -> Scores:
    rng = torch.Generator().manual_seed(seed)
    return {site.name: torch.randn(site.units, generator=rng) for site in sites}


def targets(sites: tuple[Site, ...], constraints: PlanConstraints, count: int, seed: int = 0) -> list[float]:
    """Random feasible keeps."""
    low = min_feasible_keep(sites, constraints)
    return (low + (1 - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()).tolist()


def cases(name: str, layout: str, min_groups: int = 0) -> Any:
    """(keep, scores, plan) of 20 random targets; 10 combinations of geometry and layout make 200."""
    sites, constraints = geometry(name)[0], constraints_for(name, layout, min_groups)
    for seed, keep in enumerate(targets(sites, constraints, 20)):
        scores = random_scores(sites, seed)
        yield keep, scores, select(scores, sites, keep, constraints)


both_layouts = pytest.mark.parametrize("layout", ["per-layer", "uniform"])
every_geometry = pytest.mark.parametrize("name", GEOMETRIES)


@every_geometry
@both_layouts
def test_select_is_on_budget_and_legal(name: str, layout: str) -> None:
    sites, legal = geometry(name)[0], constraints_for(name, layout)
    for keep, _, plan in cases(name, layout):
        assert kept_params(sites, plan) <= keep * prunable_params(sites)
        for site in sites:
            width = len(plan.kept[site.name])
            assert width >= min_width(site, legal)
            if site.kind is UnitKind.MLP_CHANNEL:
                assert width % legal.align == 0 or width == site.units
            elif layout == "uniform":
                assert legal.allows_groups(width)
        if layout == "uniform":
            assert len({(site.kind, len(plan.kept[site.name])) for site in sites}) == 2


@every_geometry
def test_no_further_block_fits_under_the_budget(name: str) -> None:
    sites, align = geometry(name)[0], geometry(name)[1]
    for keep, _, plan in cases(name, "per-layer"):
        params_left = keep * prunable_params(sites) - kept_params(sites, plan)
        for site in sites:
            left = site.units - len(plan.kept[site.name])
            block = min(align if site.kind is UnitKind.MLP_CHANNEL else 1, left)
            assert not block or block * site.unit_params > params_left


def test_layers_without_parameters_are_kept_with_their_blocks() -> None:
    """OLMo's norms have no weights, so a layer without its blocks has none."""
    sites = find_sites(tiny("olmo"), ("layers", "kv-groups", "mlp-blocks", "mlp-channels"))
    for keep in (1.0, 0.8, 0.6, 0.4):
        plan = select(random_scores(sites, 0), sites, keep, PlanConstraints(align=8))
        assert keep - 0.05 < kept_params(sites, plan) / prunable_params(sites) <= keep


@every_geometry
def test_no_wider_uniform_shape_fits(name: str) -> None:
    sites, align, legal = geometry(name)
    layers = len(sites) // 2
    attention, mlp = sites[0], sites[1]
    for keep, _, plan in cases(name, "uniform"):
        params_left = keep * prunable_params(sites) - kept_params(sites, plan)
        groups, channels = len(plan.kept[attention.name]), len(plan.kept[mlp.name])
        wider = min((count for count in legal if count > groups), default=groups)
        more_mlp, more_groups = min(align, mlp.units - channels), wider - groups
        assert not more_mlp or layers * more_mlp * mlp.unit_params > params_left
        # Of the maximal shapes: with another group, the MLP would have to give up channels.
        assert not more_groups or layers * more_groups * attention.unit_params > params_left


@every_geometry
@both_layouts
def test_best_units_of_a_site_are_kept(name: str, layout: str) -> None:
    for _, scores, plan in cases(name, layout):
        for site, kept in plan.kept.items():
            is_kept = torch.zeros(plan.units[site], dtype=torch.bool)
            is_kept[list(kept)] = True
            if kept and not is_kept.all():
                assert scores[site][is_kept].min() >= scores[site][~is_kept].max()


def blocks(site: Site, scores: Tensor, legal: PlanConstraints) -> list[tuple[float, int, int]]:
    """(mean score, width with the block, price) of each block above the least width."""
    size = legal.align if site.kind is UnitKind.MLP_CHANNEL else 1
    edges = [*range(min_width(site, legal), site.units, size), site.units]
    ranked = scores.double().sort(descending=True).values
    return [
        (float(ranked[low:high].mean()), high, (high - low) * site.unit_params)
        for low, high in itertools.pairwise(edges)
    ]


@every_geometry
def test_omitted_block_does_not_fit_with_better_ones(name: str) -> None:
    sites, legal = geometry(name)[0], constraints_for(name, "per-layer")
    for keep, scores, plan in cases(name, "per-layer"):
        candidates = {site.name: blocks(site, scores[site.name], legal) for site in sites}
        widths = plan.widths()
        taken = [block for site, of_site in candidates.items() for block in of_site if block[1] <= widths[site]]
        following = [
            next((block for block in of_site if block[1] > widths[site]), None) for site, of_site in candidates.items()
        ]
        for score, _, price in filter(None, following):
            better = sum(paid for mean, _, paid in taken if mean >= score - EPSILON)
            assert min_params(sites, legal) + better + price > keep * prunable_params(sites)


@every_geometry
def test_uniform_is_the_best_of_the_widest_shapes(name: str) -> None:
    sites, align, legal = geometry(name)
    attention, mlp = sites[0], sites[1]
    channels = [*range(min(align, mlp.units), mlp.units, align), mlp.units]

    def price(groups: int, width: int) -> int:
        return len(sites) // 2 * (groups * attention.unit_params + width * mlp.unit_params)

    for keep, drawn, plan in cases(name, "uniform"):
        lowest = min(0.0, *(float(values.min()) for values in drawn.values()))
        scores = {site: values.double() - lowest for site, values in drawn.items()}

        def worth(groups: int, width: int, scores: Scores = scores) -> float:
            """Score times parameters; scores count from the lowest if that is negative."""
            counts = {"attention": groups, "mlp": width}
            ranked = {s.name: scores[s.name].double().sort(descending=True).values for s in sites}
            return math.fsum(float(ranked[s.name][: counts[s.kind]].sum()) * s.unit_params for s in sites)

        fitting = {g: [c for c in channels if price(g, c) <= keep * prunable_params(sites)] for g in legal}
        widest = {g: max(widths) for g, widths in fitting.items() if widths}
        best = max(worth(g, c) for g, c in widest.items())
        score = worth(len(plan.kept[attention.name]), len(plan.kept[mlp.name]))
        assert score == pytest.approx(best, rel=1e-9)


@every_geometry
@both_layouts
def test_equal_scores_give_equal_plans(name: str, layout: str) -> None:
    sites, legal = geometry(name)[0], constraints_for(name, layout)
    for keep, scores, plan in itertools.islice(cases(name, layout), 5):
        copied = {site: score.clone().double() for site, score in reversed(scores.items())}
        assert select(copied, sites, keep, legal).to_json() == plan.to_json()


@every_geometry
@both_layouts
@pytest.mark.parametrize("level", [0.0, 0.1, -0.3, 1e6])
def test_equal_scores_keep_lower_indices_and_aligned_widths(name: str, layout: str, level: float) -> None:
    sites, legal = geometry(name)[0], constraints_for(name, layout)
    equal = {site.name: torch.full((site.units,), level) for site in sites}
    for keep in targets(sites, legal, 30, seed=1):
        plan = select(equal, sites, keep, legal)
        for site in sites:
            kept = plan.kept[site.name]
            assert kept == tuple(range(len(kept)))
            assert site.kind is UnitKind.KV_GROUP or len(kept) % legal.align == 0 or len(kept) == site.units
        assert kept_params(sites, plan) <= keep * prunable_params(sites)


def test_rounded_score_sums_keep_widths_aligned() -> None:
    # Next to 1e9, sums of 0.1 are inexact: blocks of one site must come in order all the same.
    sites, legal = build_sites(1, 2, 10, 1000, 7), PlanConstraints("per-layer", 128)
    scores = {sites[0].name: torch.zeros(2), sites[1].name: torch.full((1000,), 0.1)}
    scores[sites[1].name][:3] = torch.tensor([1e9, 3e7, 1.7e5])
    for keep in targets(sites, legal, 60):
        width = len(select(scores, sites, keep, legal).kept[sites[1].name])
        assert width % 128 == 0 or width == 1000


@every_geometry
@both_layouts
def test_keep_of_one_keeps_every_unit(name: str, layout: str) -> None:
    sites = geometry(name)[0]
    assert select(random_scores(sites, 0), sites, 1.0, constraints_for(name, layout)) == dense_plan(sites)


@every_geometry
@both_layouts
@pytest.mark.parametrize("min_groups", [0, 2])
def test_smallest_feasible_keep_is_met_and_named_in_the_error(name: str, layout: str, min_groups: int) -> None:
    sites, legal = geometry(name)[0], constraints_for(name, layout, min_groups)
    scores, lowest = random_scores(sites, 0), min_feasible_keep(sites, legal)
    plan = select(scores, sites, lowest, legal)
    assert kept_params(sites, plan) == min_params(sites, legal)
    with pytest.raises(PlanError, match=r"budget\.keep") as refused:
        select(scores, sites, lowest * 0.999, legal)
    named = float(str(refused.value).partition("feasible (")[2].partition(")")[0])
    assert lowest <= named < lowest + 0.002
    assert kept_params(sites, select(scores, sites, named, legal)) <= named * prunable_params(sites)


@every_geometry
@both_layouts
def test_every_layer_keeps_min_groups(name: str, layout: str) -> None:
    for _, _, plan in cases(name, layout, min_groups=2):
        assert all(len(kept) >= 2 for site, kept in plan.kept.items() if site.endswith("attn"))


def test_only_the_first_layer_must_keep_attention() -> None:
    sites, legal = geometry("smollm")[0], constraints_for("smollm", "per-layer")
    scores = random_scores(sites, 0) | {
        site.name: torch.full((3,), -9.0) for site in sites if site.kind is UnitKind.KV_GROUP
    }
    widths = select(scores, sites, 0.5, legal).widths()
    assert [widths[site.name] for site in sites if site.kind is UnitKind.KV_GROUP] == [1, 0, 0, 0, 0, 0]


def test_uniform_refuses_unequal_layers() -> None:
    sites = (*build_sites(1, 2, 10, 8, 2), *build_sites(2, 2, 10, 16, 2)[2:])
    with pytest.raises(PlanError, match="per-layer"):
        select(random_scores(sites, 0), sites, 0.8, PlanConstraints("uniform", 4))


def test_smallest_feasible_keep_is_feasible_for_any_model_size() -> None:
    legal = PlanConstraints("per-layer", 128)
    for layers in range(2, 40, 4):
        sites = build_sites(layers, 8, 5242880 + layers, 14336, 12288 + layers)
        scores = {site.name: torch.zeros(site.units) for site in sites}
        plan = select(scores, sites, min_feasible_keep(sites, legal), legal)
        assert kept_params(sites, plan) == min_params(sites, legal)


def test_default_align_follows_the_widest_mlp() -> None:
    assert default_align(build_sites(1, 8, 1, 14336, 1)) == 128
    assert default_align(build_sites(1, 3, 1, 1536, 1)) == 32
    assert default_align(build_sites(1, 3, 1, 96, 1)) == 24
    assert default_align(build_sites(1, 3, 1, 2, 1)) == 1


def test_bfloat16_scores_select_the_same_plan() -> None:
    sites, legal = geometry("llama")[0], constraints_for("llama", "per-layer")
    halves = {name: score.bfloat16() for name, score in random_scores(sites, 0).items()}
    wide: dict[str, Tensor] = {name: score.float() for name, score in halves.items()}
    assert select(halves, sites, 0.6, legal) == select(wide, sites, 0.6, legal)


def test_select_returns_a_plan_of_the_model() -> None:
    sites = geometry("llama")[0]
    plan = select(random_scores(sites, 0), sites, 0.6, constraints_for("llama", "per-layer"))
    assert isinstance(plan, Plan)
    assert plan.units == {site.name: site.units for site in sites}


@dataclass(frozen=True)
class TiledCost:
    """MLP channels, and 20 more in a layer whose number does not fill tiles of 16."""

    dense_shape: ModelShape

    def fixed_cost(self, counts: Mapping[str, int]) -> float:
        return 0.0

    def layer_cost(self, layer: int, counts: Mapping[str, int]) -> float:
        mlp = next(site for site in self.dense_shape.layers[layer].sites if site.kind is UnitKind.MLP_CHANNEL)
        return counts[mlp.name] + (20 if counts[mlp.name] % 16 else 0)


def test_block_that_a_limit_refuses_is_added_with_the_next_if_both_fit() -> None:
    """Eight channels more cost 28, the next eight cost less than nothing: 80 are within the limit and 72 are not."""
    model = tiny()
    sites = find_sites(model)
    cost = TiledCost(model_shape(model, sites))
    dense = 3 * 96.0
    limits = BudgetLimits((BudgetLimit("latency", (cost,), 3 * 80.0, dense),))
    scores = {site.name: torch.arange(site.units, dtype=torch.float32) for site in sites}
    plan = select(scores, sites, 0.0, PlanConstraints("per-layer", 8, limits=limits))
    widths = [len(plan.kept[site.name]) for site in sites if site.kind is UnitKind.MLP_CHANNEL]
    assert sum(widths) == 3 * 80
    assert all(width % 16 == 0 for width in widths)
    assert all(len(plan.kept[site.name]) == site.units for site in sites if site.kind is UnitKind.KV_GROUP)


@both_layouts
def test_limit_is_accepted_down_to_the_smallest_plan(layout: str) -> None:
    """That one has 8 channels in each of 3 layers, which cost 28."""
    sites = find_sites(tiny())
    cost, scores = TiledCost(model_shape(tiny(), sites)), {site.name: torch.zeros(site.units) for site in sites}

    def plan_within(limit: float) -> Plan:
        limits = BudgetLimits((BudgetLimit("latency", (cost,), limit, 3 * 96.0),))
        return select(scores, sites, 0.0, PlanConstraints(layout, 8, limits=limits))

    assert kept_params(sites, plan_within(3 * 28.0)) > 0
    with pytest.raises(PlanError, match=f"not even the smallest plan of layout {layout} with budget.align 8"):
        plan_within(3 * 28.0 - 1)


def test_infeasible_keep_is_refused_with_the_least_that_is_accepted() -> None:
    """In three digits."""
    for name in GEOMETRIES:
        sites, align, _ = geometry(name)
        for min_share in (0.0, 0.7, 0.93):
            constraints, scores = PlanConstraints("per-layer", align, min_share=min_share), random_scores(sites, 0)
            with pytest.raises(PlanError, match=r"is below what is feasible \([01]\.\d{3}\)") as refused:
                select(scores, sites, 0.001, constraints)
            least = float(str(refused.value).partition("feasible (")[2][:5])
            assert kept_params(sites, select(scores, sites, least, constraints)) <= least * prunable_params(sites)
            with pytest.raises(PlanError):
                select(scores, sites, least - 0.001, constraints)
