"""Laws of several budgets: met closely from below, or refused with the nearest amount, which is then accepted."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from prunetune.config.quantities import Amount
from prunetune.config.recipe import WorkloadConfig, from_mapping
from prunetune.cost.budget_limits import (
    TIMED_BUDGETS,
    BudgetLimit,
    BudgetLimits,
    costs_for_budget,
    make_budget_limit,
    make_budget_limits,
)
from prunetune.cost.deployment import max_cost
from prunetune.cost.latency_table import TRACKS, LatencyCost, LatencyTable, LayerTiming, representative_layers
from prunetune.cost.layer_shapes import ModelShape, model_shape
from prunetune.errors import PlanError
from prunetune.pruning.masking import gates_from_plan
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import KIND_BY_NAME, Site, UnitKind, dense_plan, kept_params, kept_share
from prunetune.search.nested_sites import NestedSites
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.searcher import Searcher
from prunetune.search.select import min_feasible_keep, min_widths, select, uniform_scores, with_limits
from support.models import tiny

WORKLOAD = WorkloadConfig()
NAMES = ("smollm", "llama3-8b", "qwen3-4b", "gemma3-270m")
STEP = 1e-6  # seconds of a tile
KIND_NAMES = ("flops", "memory", "file", "latency", "throughput")


@cache
def geometry(name: str) -> tuple[tuple[Site, ...], ModelShape, PlanConstraints]:
    """Real shapes on the meta device, with half of the layers or fewer, on which the laws do not depend."""
    family, hidden, width, layers, heads, groups, size, vocabulary, align = {
        "smollm": ("llama", 576, 1536, 10, 9, 3, 64, 49152, 32),
        "llama3-8b": ("llama", 4096, 14336, 4, 32, 8, 128, 128256, 128),
        "qwen3-4b": ("qwen3", 2560, 9728, 4, 32, 8, 128, 151936, 128),
        "gemma3-270m": ("gemma3_text", 640, 2048, 12, 4, 1, 256, 262144, 32),
    }[name]
    config = CONFIG_MAPPING[family](
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=size, vocab_size=vocabulary, tie_word_embeddings=name != "llama3-8b",
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sites = find_sites(model)
    return sites, model_shape(model, sites), PlanConstraints("per-layer", align)


def table_of(anatomy: ModelShape, tile: int = 256) -> LatencyTable:
    """A latency table whose seconds rise with each started tile of channels, so that the rest of a tile is free."""
    layers = {}
    for layer in set(representative_layers(anatomy).values()):
        units = {site.kind: site.units for site in anatomy.layers[layer].sites}
        mlp = [(width, STEP * (-(-width // tile) - units["mlp"] // tile)) for width in range(8, units["mlp"] + 1, 8)]
        attention = [(count, STEP * (count - units["attention"])) for count in range(units["attention"] + 1)]
        layers[layer] = LayerTiming(
            STEP * (1 + units["attention"] + units["mlp"] // tile), tuple(attention), tuple(mlp)
        )
    host = {layer: LayerTiming(STEP, ((0, -STEP), (1, 0.0)), ()) for layer in layers}  # which only attention takes
    tracks = {track: layers if track.endswith("device") else host for track in TRACKS}
    return LatencyTable({}, dict.fromkeys(TRACKS, 1e-6), tracks)


def scores_of(sites: tuple[Site, ...], seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {site.name: torch.randn(site.units, generator=rng) for site in sites}


def budget_at(kind: str, name: str, position: float, workload: WorkloadConfig = WORKLOAD) -> BudgetLimit:
    """A budget between what is feasible (0) and the dense model (1); below 0 it is not feasible."""
    sites, anatomy, constraints = geometry(name)
    costs, nested_sites = costs_for_budget(kind, anatomy, workload, table_of(anatomy)), NestedSites(sites)
    least = max_cost(costs, nested_sites.kept_unit_counts(min_widths(nested_sites, constraints), sites))
    dense = max_cost(costs, anatomy.dense_counts())
    limit = least + position * (dense - least) if position > 0 else least * (1 + position)
    tokens = workload.batch * workload.generate
    return make_budget_limit(kind, Amount(tokens / limit if kind == "throughput" else limit, False), costs, workload)


def limits_of(constraints: PlanConstraints) -> BudgetLimits:
    assert constraints.limits is not None
    return constraints.limits


every_model = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", KIND_NAMES)


@every_model
@every_kind
def test_budget_is_met_from_below_within_a_hundredth(name: str, kind: str) -> None:
    sites, _, constraints = geometry(name)
    for seed, position in enumerate((0.13, 0.71)):
        budget = budget_at(kind, name, position)
        limited = with_limits(constraints, sites, [budget], 1.0)
        plan = select(scores_of(sites, seed), sites, limits_of(limited).feasible_keep, limited)
        below = 1 - budget.cost(plan.widths()) / budget.limit
        table_step = WORKLOAD.generate * STEP / budget.limit if kind in TIMED_BUDGETS else 0.0
        assert -1e-9 <= below <= max(0.01, table_step)


@every_model
@every_kind
def test_infeasible_budget_is_refused_with_the_nearest_amount(name: str, kind: str) -> None:
    sites, anatomy, constraints = geometry(name)
    budget = budget_at(kind, name, -0.2)
    with pytest.raises(PlanError, match=rf"budget\.{kind} .* what is feasible") as refused:
        with_limits(constraints, sites, [budget], 1.0)
    nearest = str(refused.value).partition("feasible (")[2].partition(";")[0]
    again = make_budget_limits({kind: Amount.parse(nearest, kind)}, anatomy, WORKLOAD, table_of(anatomy))
    plan = select(scores_of(sites, 0), sites, 0.0, with_limits(constraints, sites, again, 1.0))
    assert again[0].cost(plan.widths()) <= again[0].limit * (1 + 1e-9)


@every_model
def test_several_budgets_hold_together(name: str) -> None:
    sites, _, constraints = geometry(name)
    caps = [budget_at("memory", name, 0.5), budget_at("flops", name, 0.45), budget_at("latency", name, 0.6)]
    limited = with_limits(constraints, sites, caps, 0.7)
    plan = select(scores_of(sites, 3), sites, limits_of(limited).feasible_keep, limited)
    assert kept_params(sites, plan) <= 0.7 * sum(site.params for site in sites)
    shares = [cap.cost(plan.widths()) / cap.limit for cap in caps]
    assert max(shares) <= 1 + 1e-9
    assert max(shares) > 0.98  # and one of them binds


@every_model
def test_no_further_block_fits_under_a_memory_budget(name: str) -> None:
    """A block more takes two bytes for each of its weights, and for 4096 keys and values of 64 requests."""
    sites, anatomy, constraints = geometry(name)
    budget = budget_at("memory", name, 0.4, WorkloadConfig(batch=64, context=4096))
    limited = with_limits(constraints, sites, [budget], 1.0)
    plan = select(scores_of(sites, 1), sites, limits_of(limited).feasible_keep, limited)
    spent = budget.cost(plan.widths())
    assert spent <= budget.limit
    for site in sites:
        is_mlp = site.kind is UnitKind.MLP_CHANNEL
        block = min(constraints.align if is_mlp else 1, site.units - len(plan.kept[site.name]))
        layer = anatomy.layers[site.layer]
        tokens = min(4096, layer.sliding_window or 4096)
        cached = 0 if is_mlp else 2 * 64 * tokens * layer.head_dim
        more = 2 * block * (site.unit_params + cached)
        assert not block or spent + more > budget.limit
        wider = plan.widths() | {site.name: len(plan.kept[site.name]) + block}
        assert budget.cost(wider) == pytest.approx(spent + more)


def test_uniform_plan_meets_budgets_too() -> None:
    sites, _, constraints = geometry("llama3-8b")
    uniform = PlanConstraints("uniform", constraints.align)
    caps = [budget_at("memory", "llama3-8b", 0.5), budget_at("latency", "llama3-8b", 0.5)]
    limited = with_limits(uniform, sites, caps, 1.0)
    plan = select(scores_of(sites, 0), sites, limits_of(limited).feasible_keep, limited)
    assert len({(site.kind, len(plan.kept[site.name])) for site in sites}) == 2
    assert 0.98 < max(cap.cost(plan.widths()) / cap.limit for cap in caps) <= 1 + 1e-9


def test_budget_that_the_dense_model_meets_is_refused() -> None:
    sites, anatomy, constraints = geometry("smollm")
    for kind, text in (("memory", "100GB"), ("throughput", "0.001/s")):
        caps = make_budget_limits({kind: Amount.parse(text, kind)}, anatomy, WORKLOAD, table_of(anatomy))
        with pytest.raises(PlanError, match="nothing would have to be pruned"):
            with_limits(constraints, sites, caps, 1.0)
        with_keep = with_limits(constraints, sites, caps, 0.5)  # accepted, since the keep has to be met
        assert limits_of(with_keep).feasible_keep <= 0.5


def test_budget_below_the_least_widths_is_named() -> None:
    """Budgets are upper limits, so they can only contradict the least widths."""
    sites, _, constraints = geometry("smollm")
    guarded = PlanConstraints("per-layer", constraints.align, min_share=0.9)
    with pytest.raises(PlanError, match=r"budget\.memory.*min_share"):
        with_limits(guarded, sites, [budget_at("memory", "smollm", 0.2)], 1.0)
    with pytest.raises(PlanError, match=r"budget\.keep"):
        with_limits(guarded, sites, [budget_at("memory", "smollm", 1.0)], 0.5)


def test_long_cache_raises_the_price_of_kv_groups() -> None:
    sites, _, constraints = geometry("llama3-8b")
    prices = []
    for workload in (WORKLOAD, WorkloadConfig(batch=32, context=32768)):
        unit_prices = limits_of(
            with_limits(constraints, sites, [budget_at("memory", "llama3-8b", 0.5, workload)], 1.0)
        ).prices
        assert unit_prices is not None
        prices.append(unit_prices[sites[0].name] / unit_prices[sites[1].name])
    assert prices[1] > 20 * prices[0]


def test_prices_under_a_file_budget_are_parameters() -> None:
    sites, _, constraints = geometry("qwen3-4b")
    limits = limits_of(with_limits(constraints, sites, [budget_at("file", "qwen3-4b", 0.5)], 1.0))
    assert limits.prices is not None
    for site in sites:
        assert limits.prices[site.name] == pytest.approx(site.unit_params, rel=1e-3)
    assert limits.feasible_price_share == pytest.approx(limits.feasible_keep, rel=1e-3)


def test_limits_fall_in_a_straight_line_from_the_dense_model() -> None:
    sites, _, constraints = geometry("llama3-8b")
    budget = budget_at("memory", "llama3-8b", 0.4)
    limited = with_limits(constraints, sites, [budget], 1.0)
    limits = limits_of(limited)
    assert limits.cost_limits_at(1.0) == ((budget.costs[0], budget.dense_cost),)
    assert limits.cost_limits_at(limits.feasible_keep)[0][1] == pytest.approx(budget.limit)
    middle = limits.cost_limits_at((1 + limits.feasible_keep) / 2)[0][1]
    assert middle == pytest.approx((budget.dense_cost + budget.limit) / 2)
    scores = scores_of(sites, 0)
    assert select(scores, sites, 1.0, limited) == dense_plan(sites)
    sizes = [kept_params(sites, select(scores, sites, keep, limited)) for keep in (1.0, 0.8, 0.7, limits.feasible_keep)]
    assert sizes == sorted(sizes, reverse=True)


def test_search_meets_the_budget() -> None:
    model = tiny("llama", layers=4)
    sites = find_sites(model)
    anatomy, constraints = model_shape(model, sites), PlanConstraints("per-layer", 8)
    caps = make_budget_limits({"memory": Amount.parse("0.7", "memory")}, anatomy, WorkloadConfig(context=16))
    limited = with_limits(constraints, sites, caps, 1.0)
    config = from_mapping({"budget": {"keep": limits_of(limited).feasible_keep}})
    searcher = Searcher(sites, limited, config, torch.device("cpu"))
    drawn = searcher.sample(0)
    assert all(gate.requires_grad for gate in drawn.values())
    assert torch.isfinite(searcher.budget_loss(drawn))
    plan = searcher.final_decision().plan
    assert plan is not None
    assert 0.9 * caps[0].limit < caps[0].cost(plan.widths()) <= caps[0].limit * (1 + 1e-9)
    even_plan = select(uniform_scores(sites), sites, limits_of(limited).feasible_keep, limited)
    share = kept_share(gates_from_plan(even_plan, sites), sites, limits_of(limited).prices)
    assert float(share) == pytest.approx(limits_of(limited).feasible_price_share, rel=1e-5)


def test_units_of_every_kind_are_priced() -> None:
    model = tiny("llama", layers=4, groups=2, ratio=2)
    units = [name for name in KIND_BY_NAME if "expert" not in name]
    sites = find_sites(model, units)
    anatomy, constraints = model_shape(model, sites), PlanConstraints("per-layer", 8)
    for kind in ("flops", "memory", "file"):
        caps = make_budget_limits({kind: Amount.parse("0.7", kind)}, anatomy, WORKLOAD)
        limited = with_limits(constraints, sites, caps, 1.0)
        plan = select(scores_of(sites, 0), sites, limits_of(limited).feasible_keep, limited)
        assert caps[0].cost(plan.widths()) <= caps[0].limit * (1 + 1e-9)
        assert all(price > 0 for price in (limits_of(limited).prices or {}).values())


def test_latency_plans_fill_whole_tiles() -> None:
    """Widths are multiples of 32 and a tile has 256 channels: those that cost no time are kept."""
    sites, anatomy, constraints = geometry("smollm")
    assert all(isinstance(cost, LatencyCost) for cost in budget_at("latency", "smollm", 0.5).costs)
    limited = with_limits(constraints, sites, [budget_at("latency", "smollm", 0.5)], 1.0)
    plan = select(scores_of(sites, 0), sites, limits_of(limited).feasible_keep, limited)
    widths = [len(plan.kept[site.name]) for site in sites if site.kind is UnitKind.MLP_CHANNEL]
    assert all(width % 256 == 0 for width in widths)
    assert min_feasible_keep(sites, constraints) < limits_of(limited).feasible_keep < 1
    assert anatomy.layers
