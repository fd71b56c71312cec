"""Checkpoints of models that lost other units than heads and channels open and equal the gated model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunetune import Plan, cut, find_sites, masked
from prunetune.errors import PlanError
from prunetune.export.checkpoint import kv_groups_validator, write_checkpoint
from prunetune.export.selfcheck import check_checkpoint, compute_logits
from prunetune.pruning.units import dense_plan
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select
from support.data import subwords
from support.models import ALL_FAMILIES, kinds_of, random_plan, relative, tiny, tokens, with_lora

LAYERS = 4
BLOCKS = ("attention-blocks", "mlp-blocks")  # for which a uniform configuration has no option


def uniform_plan(model: Any, units: tuple[str, ...], keep: float = 0.6) -> Plan:
    sites = find_sites(model, units)
    rng = torch.Generator().manual_seed(3)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in sites}
    return select(
        scores, sites, keep, PlanConstraints("uniform", align=8, allows_groups=kv_groups_validator(model.config))
    )


def uniform_kinds(family: str) -> tuple[str, ...]:
    """The kinds that the family's uniform configuration can express; Bloom has no option for the MLP width."""
    return tuple(
        kind for kind in kinds_of(family) if kind not in BLOCKS and (family, kind) != ("bloom", "mlp-channels")
    )


def write(model: Any, plan: Plan, layout: str, folder: Path, units: tuple[str, ...]) -> tuple[Any, torch.Tensor]:
    """Write the cut model with its adapters merged; returns the checkpoint and the gated model's logits."""
    sites = find_sites(model, units)
    with_lora(model)
    with masked(model, plan, sites=sites):
        expected = compute_logits(model, tokens())
    cut(model, plan, sites=sites)
    return write_checkpoint(model, subwords(), plan, sites, folder, layout=layout, card=""), expected


def check_reopened(model: Any, plan: Plan, layout: str, folder: Path, units: tuple[str, ...]) -> Any:
    checkpoint, expected = write(model, plan, layout, folder, units)
    reopened = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=checkpoint.needs_code).eval()
    assert sum(parameter.numel() for parameter in reopened.parameters()) == checkpoint.params
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-5
    return reopened


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_per_layer_checkpoint_of_all_unit_kinds_equals_gated_model(family: str, tmp_path: Path) -> None:
    units, model = kinds_of(family), tiny(family, layers=LAYERS)
    check_reopened(model, random_plan(model, units=units, seed=1, keep=0.7), "per-layer", tmp_path / family, units)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_uniform_checkpoint_of_all_unit_kinds_equals_gated_model(family: str, tmp_path: Path) -> None:
    units, model = uniform_kinds(family), tiny(family, layers=LAYERS)
    check_reopened(model, uniform_plan(model, units), "uniform", tmp_path / family, units)


SINGLE = [(family, kind, "per-layer") for family in ALL_FAMILIES for kind in kinds_of(family)]
SINGLE += [
    (family, kind, "uniform")
    for family in ("qwen3", "phi3", "gpt2", "bloom", "mixtral", "gpt_oss")
    for kind in uniform_kinds(family)
    if kind != "hidden-channels"
]
SINGLE += [(family, "hidden-channels", "uniform") for family in ALL_FAMILIES if "hidden-channels" in kinds_of(family)]


@pytest.mark.parametrize(("family", "kind", "layout"), SINGLE)
def test_checkpoint_of_one_unit_kind_equals_gated_model(family: str, kind: str, layout: str, tmp_path: Path) -> None:
    units, model = (kind,), tiny(family, layers=LAYERS)
    plan = uniform_plan(model, units, 0.85) if layout == "uniform" else random_plan(model, units=units, seed=1)
    check_reopened(model, plan, layout, tmp_path / "model", units)


@pytest.mark.parametrize(
    ("family", "units", "layout"),
    [
        ("gemma2", ("layers", "kv-groups", "mlp-channels"), "uniform"),
        ("gpt_oss", ("layers", "attention-blocks", "experts", "expert-channels"), "per-layer"),
    ],
)
def test_checkpoint_generates_the_same_tokens_in_a_fresh_process(
    family: str, units: tuple[str, ...], layout: str, tmp_path: Path
) -> None:
    model = tiny(family, layers=6)
    plan = uniform_plan(model, units) if layout == "uniform" else random_plan(model, units=units, seed=4, keep=0.7)
    folder = tmp_path / "model"
    checkpoint, expected = write(model, plan, layout, folder, units)
    assert check_checkpoint(checkpoint, tokens(), expected).max_relative <= 1e-5
    reopened = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=checkpoint.needs_code).eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = [reopened.generate(tokens(length=10), use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*generated)
    assert torch.equal(generated[0], model.generate(tokens(length=10), **options))


def test_two_folders_of_one_name_keep_their_own_code(tmp_path: Path) -> None:
    """transformers keeps generated classes by the folder's name and the configuration's class."""
    for units in (("mlp-channels",), ("kv-groups",)):
        model = tiny("llama")
        check_reopened(model, random_plan(model, units=units), "per-layer", tmp_path / units[0] / "model", units)


def test_checkpoint_without_whole_layers_needs_no_code(tmp_path: Path) -> None:
    model = tiny("llama", layers=4)
    plan = random_plan(model, units=["layers"], seed=1)
    checkpoint, _ = write(model, plan, "per-layer", tmp_path / "model", ("layers",))
    assert (checkpoint.layout, checkpoint.needs_code, checkpoint.architecture) == ("uniform", False, "LlamaForCausalLM")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == model.config.num_hidden_layers < 4
    assert not list((tmp_path / "model").glob("*.py"))


def test_uniform_layout_refuses_removed_blocks() -> None:
    model = tiny("llama")
    with pytest.raises(PlanError, match="cannot express layers without attention-blocks or mlp-blocks: use layout per"):
        uniform_plan(model, ("attention-blocks", "mlp-blocks"))


def test_per_layer_layout_holds_mlps_beside_mixtures(tmp_path: Path) -> None:
    units = ("kv-groups", "mlp-blocks", "experts")
    model = tiny("qwen3_moe", layers=4, mlp_only_layers=[1])
    check_reopened(model, random_plan(model, units=units), "per-layer", tmp_path / "model", units)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_llama_whose_heads_do_not_divide_the_narrow_stream_is_written(layout: str, tmp_path: Path) -> None:
    """Nine heads, as SmolLM2 has, and 40 of 72 channels: Llama's class refuses them, those that are written do not."""
    units, model = ("hidden-channels", "mlp-channels"), tiny("llama", groups=3, ratio=3, hidden_size=72)
    dense = dense_plan(find_sites(model, units))
    plan = Plan({**dense.kept, "model:hidden-channels": tuple(range(3, 43))}, dense.units)
    reopened = check_reopened(model, plan, layout, tmp_path / "model", units)
    assert (reopened.config.hidden_size, reopened.config.num_attention_heads) == (40, 9)
