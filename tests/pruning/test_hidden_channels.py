"""Hidden channels: what belongs to them, who is refused, norms, parameters, and how many of them a plan keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunetune import Plan, cut, find_sites, masked
from prunetune.errors import ConfigError, PlanError
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.hidden_channels import keep_norm_scale, stream_axes
from prunetune.pruning.sites import unprunable_kinds
from prunetune.pruning.units import DEFAULT_UNITS, dense_plan, hidden_site, kept_params, prunable_params, removed_params
from prunetune.search.plan_rules import PlanConstraints, budget_params, budget_share
from prunetune.search.select import min_feasible_keep, select, uniform_scores
from support.models import ALL_FAMILIES, kinds_of, relative, tiny, tokens, with_lora

NAME = "model:hidden-channels"
UNITS = ("hidden-channels", *DEFAULT_UNITS)
FAMILIES = [family for family in ALL_FAMILIES if "hidden-channels" in kinds_of(family)]


def plan_of(sites: Any, kept: tuple[int, ...]) -> Plan:
    """All units but the other hidden channels."""
    dense = dense_plan(sites)
    return Plan({**dense.kept, NAME: kept}, dense.units)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


# -- what belongs to the stream ----------------------------------------------------------------------------------------


def test_families_of_rms_norms_have_hidden_channels() -> None:
    assert len(FAMILIES) >= 24
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_stream_has_one_axis_of_the_hidden_size(family: str) -> None:
    """56 is no other size of these models, so that the axes of this size are all that there are."""
    model = tiny(family, hidden_size=56)
    axes = stream_axes(model.config)
    expected = {
        name: [axis for axis, size in enumerate(weight.shape) if size == 56]
        for name, weight in model.named_parameters(remove_duplicate=False)
        if 56 in weight.shape
    }
    assert {name: [axis] for name, axis in axes.items()} == expected


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "cohere", "olmo", "phi", "helium", "nemotron"])
def test_family_without_rms_norms_is_refused_by_name(family: str) -> None:
    reason = unprunable_kinds(tiny(family), ["hidden-channels"])["hidden-channels"]
    assert "Norm" in reason or "fill the hidden size" in reason
    with pytest.raises(ConfigError, match=r"budget\.units: hidden-channels cannot be pruned in this model: .*"):
        find_sites(tiny(family), UNITS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
def test_tied_head_loses_the_columns_of_the_embedding_once(family: str, tied: bool) -> None:
    model = with_lora(tiny(family, tie_word_embeddings=tied))
    sites = find_sites(model, UNITS)
    plan = plan_of(sites, tuple(range(0, 48, 2)))
    before = sum(weight.numel() for weight in model.parameters())
    adapters = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    with masked(model, plan, sites=sites):
        expected = logits_of(model)
    cut(model, plan, sites=sites)
    assert relative(logits_of(model), expected) <= 1e-5
    after = sum(weight.numel() for weight in model.parameters())
    assert before - adapters - after == removed_params(sites, plan)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert (model.config.hidden_size, model.config.head_dim) == (24, 8)


# -- norms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "gemma3_text", "qwen3"])
def test_norms_keep_their_scale_over_a_cut(family: str) -> None:
    """Channels that carry nothing leave without a change of the logits."""
    model = tiny(family).requires_grad_(False)
    sites, kept = find_sites(model, UNITS), tuple(range(16, 48))
    hidden = hidden_site(sites)
    assert hidden is not None
    with torch.no_grad():  # nothing writes to the first 16 channels
        model.get_input_embeddings().weight[:, :16] = 0
        for writer in hidden.producers:
            model.get_submodule(writer.module).weight[:16] = 0
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = 0.0
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.0
    expected = logits_of(model)
    keep_norm_scale(model, hidden, len(kept))
    cut_linears(model, plan_of(sites, kept), sites=sites)
    assert relative(logits_of(model), expected) <= 1e-5
    tuned = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(tuned) >= 2 * len(model.model.layers) + 1
    assert all("norm" in name for name in tuned)


def test_gradient_at_a_channels_gate_is_that_of_the_scaled_stream() -> None:
    """As its finite difference says; a norm's mean counts all channels, whatever the gate."""
    model = tiny("llama").double()
    sites = find_sites(model, ("hidden-channels",))
    gates = {NAME: torch.ones(48, dtype=torch.float64, requires_grad=True)}
    with masked(model, gates, sites=sites):
        loss = model(tokens()).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, [gates[NAME]])

    def loss_at(value: float) -> float:
        with torch.no_grad():
            for name in ("model.embed_tokens", *(writer.module for writer in sites[0].producers)):
                weight = model.get_submodule(name).weight
                rows = weight if name.endswith("embed_tokens") else weight.t()
                rows[:, 5] *= value
            result = float(model(tokens()).logits.square().mean())
            for name in ("model.embed_tokens", *(writer.module for writer in sites[0].producers)):
                weight = model.get_submodule(name).weight
                rows = weight if name.endswith("embed_tokens") else weight.t()
                rows[:, 5] /= value
        return result

    difference = (loss_at(1 + 1e-3) - loss_at(1 - 1e-3)) / 2e-3
    assert float(gradient[5]) == pytest.approx(difference, rel=1e-2)


# -- the number of channels in a plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
def test_plan_keeps_the_number_of_channels_that_loses_least(family: str, layout: str) -> None:
    """Where channels cost nothing they go first, and where they cost most all of them stay."""
    sites = find_sites(tiny(family, groups=4), tuple(k for k in kinds_of(family) if k in (*UNITS, "expert-channels")))
    constraints = PlanConstraints(layout, 8)
    for worth, expected in ((1e-6, range(1, 48)), (1e6, [48])):
        scores = {site.name: torch.rand(site.units) for site in sites}
        scores[NAME] *= worth
        for keep in (0.8, 0.5):
            plan = select(scores, sites, keep, constraints)
            assert len(plan.kept[NAME]) in expected
            assert len(plan.kept[NAME]) % 8 == 0
            assert kept_params(sites, plan) <= keep * prunable_params(sites)
            best = set(scores[NAME].argsort(descending=True, stable=True)[: len(plan.kept[NAME])].tolist())
            assert set(plan.kept[NAME]) == best
            smaller = select(scores, sites, keep - 0.2, constraints, larger_plan=plan)
            assert all(set(kept) <= set(plan.kept[name]) for name, kept in smaller.kept.items())


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("units", [DEFAULT_UNITS, UNITS])
def test_budget_of_the_model_is_a_share_of_all_its_parameters(units: tuple[str, ...], layout: str) -> None:
    model = tiny("llama", groups=4)
    sites, total = find_sites(model, units), sum(weight.numel() for weight in model.parameters())
    constraints = PlanConstraints(layout, 8, budget_of="model", model_params=total)
    lowest = min_feasible_keep(sites, constraints)
    for keep in (0.9, 0.7, lowest):
        plan = select(uniform_scores(sites), sites, keep, constraints)
        left = total - removed_params(sites, plan)
        assert left == budget_params(sites, plan.widths(), constraints)
        assert keep * total * 0.85 < left <= keep * total * (1 + 1e-9)
        assert budget_share(sites, plan.widths(), constraints) == left / total
        small = tiny("llama", groups=4)
        cut(small, plan, sites=sites)
        assert sum(weight.numel() for weight in small.parameters()) == left
    with pytest.raises(PlanError, match=r"below what is feasible"):
        select(uniform_scores(sites), sites, lowest * 0.9, constraints)


def test_share_counts_tokens_that_the_vocabulary_has_lost() -> None:
    model = tiny("llama")
    sites, total = find_sites(model), sum(weight.numel() for weight in model.parameters())
    constraints = PlanConstraints("per-layer", 8, budget_of="model", model_params=total, original_params=2 * total)
    plan = select(uniform_scores(sites), sites, 0.4, constraints)
    assert 0.7 * total < total - removed_params(sites, plan) <= 0.8 * total
    assert select(uniform_scores(sites), sites, 0.5, constraints) == dense_plan(sites)
