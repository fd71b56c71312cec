"""Architectures without an entry open where masked equals cut in a small model, and are refused by name elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from prunetune import cut, find_sites, masked
from prunetune.errors import ConfigError, UnknownArchitecture
from prunetune.export.checkpoint import write_checkpoint
from prunetune.pipeline.plan_constraints import check_layout
from prunetune.pruning import family_check
from prunetune.pruning.families import FAMILIES, Family
from prunetune.pruning.family_check import checked_family, half_plan, read_family
from prunetune.pruning.sites import unprunable_kinds
from prunetune.pruning.tiny_models import tiny_config, tiny_model
from prunetune.pruning.units import KIND_BY_NAME, UnitKind
from support.data import subwords
from support.models import relative, tokens

TOLERANCE = 1e-5
# One of a plain plan, of layers with and without attention, of latent attention beside experts; and one whose
# `base_model_prefix` names no module, whose experts' matrices are transposed.
CHECKED = {
    **dict.fromkeys(
        ("cwm", "hyperclovax", "internlm3", "iquestcoder", "nanochat", "vaultgemma", "biogpt"),
        ("kv-groups", "mlp-channels"),
    ),
    "qwen3_5_text": ("kv-groups", "mlp-channels"),
    "deepseek_v3": ("kv-groups", "expert-channels"),
    "llama4_text": ("kv-groups", "expert-channels"),
}


def small(family: str, **changes: Any) -> Any:
    return tiny_model(tiny_config(CONFIG_MAPPING[family](**changes)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("family", CHECKED)
def test_architecture_without_entry_is_cut_and_written_as_masked(family: str, tmp_path: Path) -> None:
    assert family not in FAMILIES
    model, units = small(family), CHECKED[family]
    sites = find_sites(model, units)
    assert {site.kind.recipe_name for site in sites} == set(units)
    plan = half_plan(sites)
    with masked(model, plan, sites=sites):
        expected = logits(model)
    assert relative(logits(model), expected) > 0.01, "the plan must matter"
    cut(model, plan, sites=sites)
    assert relative(logits(model), expected) <= TOLERANCE
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout="per-layer", card="")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=written.needs_code).eval()
    assert relative(logits(opened), expected) <= TOLERANCE


@pytest.mark.parametrize(("family", "least"), [("glm_moe_dsa", 1), ("glm4_moe", 0)])
def test_attention_that_cannot_be_removed_keeps_a_group(family: str, least: int) -> None:
    """Layers of GLM 5 read a third result of their attention, which an empty one does not give."""
    groups = [site for site in find_sites(small(family), ("kv-groups",)) if site.kind is UnitKind.KV_GROUP]
    assert [site.min_units_per_group for site in groups] == [1, *[least] * (len(groups) - 1)]


def test_linear_attention_of_a_hybrid_stays_whole() -> None:
    model = small("qwen3_5_text")
    of_heads = {site.layer for site in find_sites(model) if site.kind is UnitKind.KV_GROUP}
    assert of_heads == {index for index, kind in enumerate(model.config.layer_types) if kind == "full_attention"}
    assert UnitKind.LAYER in unprunable_kinds(model, tuple(KIND_BY_NAME))


def test_channels_that_share_statistics_are_refused() -> None:
    """Gemma 3n's MLP keeps channels above a quantile of all of them, so that no channel leaves alone."""
    with pytest.raises(UnknownArchitecture, match=r"'gemma3n_text' has no entry .* something else cut than masked"):
        find_sites(small("gemma3n_text"))


def test_model_without_attention_is_refused() -> None:
    with pytest.raises(UnknownArchitecture, match="'mamba' has no attention heads"):
        find_sites(small("mamba"))


def test_wrong_coupling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With k's rows left out, each kind of head fails the check and the channels of the MLP still open."""

    def without_k(model: Any) -> Family:
        family = read_family(model)
        plan = {name: style for name, style in family.tp_plan.items() if name != "self_attn.k_proj"}
        return Family(tp_plan=plan, intermediate_size_key=family.intermediate_size_key)

    monkeypatch.setattr(family_check, "read_family", without_k)
    monkeypatch.setattr(family_check, "_families", {})
    unprunable = checked_family(CONFIG_MAPPING["cwm"]()).unprunable
    assert UnitKind.KV_GROUP in unprunable
    assert UnitKind.MLP_CHANNEL not in unprunable


def test_layout_that_cannot_hold_a_kind_is_refused_before_training() -> None:
    """The width of experts is that of shared experts too, which are not cut."""
    config = small("deepseek_v3").config
    with pytest.raises(ConfigError, match=r"layout uniform cannot hold .* of 'deepseek_v3'.*use --layout per-layer"):
        check_layout(config, ("kv-groups", "expert-channels"), "uniform")
    check_layout(config, ("kv-groups",), "uniform")
