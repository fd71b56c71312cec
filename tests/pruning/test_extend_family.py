"""The example in docs/extend/family.md: one entry in the table makes an architecture prunable."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunetune import Plan, cut, find_sites, masked
from prunetune.export.checkpoint import write_checkpoint
from prunetune.pruning.families import FAMILIES, Family
from prunetune.pruning.sites import unprunable_kinds
from prunetune.pruning.units import KIND_BY_NAME, UnitKind, dense_plan
from support.data import subwords
from support.models import random_plan, relative, tiny, tokens, with_lora

NAME = "hunyuan_v1_dense"
PAGE = Path(__file__).parents[2] / "docs" / "extend" / "family.md"
TOLERANCE = 1e-5
LAYERS = 4


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's script defines; its entry is removed after the test."""
    monkeypatch.setitem(FAMILIES, NAME, Family())
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(script, str(PAGE), "exec"), names)
    return names


def test_example_prunes_half_of_all_heads_and_channels(example: dict[str, Any]) -> None:
    assert {site.kind for site in example["sites"]} == {UnitKind.KV_GROUP, UnitKind.MLP_CHANNEL}
    layer = example["model"].model.layers[0]
    assert (layer.self_attn.k_proj.out_features, layer.mlp.down_proj.in_features) == (8, 48)
    assert torch.isfinite(example["pruned"]).all()


@pytest.mark.usefixtures("example")
def test_masked_equals_cut_for_every_kind_with_adapters() -> None:
    unprunable = unprunable_kinds(tiny(NAME), tuple(KIND_BY_NAME))
    assert set(unprunable) == {UnitKind.EXPERT, UnitKind.EXPERT_CHANNEL}
    names = [kind.recipe_name for kind in UnitKind if kind not in unprunable]
    for units in [*([name] for name in names), names]:
        model = with_lora(tiny(NAME, layers=LAYERS))
        plan = random_plan(model, units=units, seed=1)
        with torch.no_grad():
            with masked(model, plan):
                expected = model(tokens()).logits
            dense, pruned = model(tokens()).logits, cut(model, plan)(tokens()).logits
        assert relative(pruned, expected) <= TOLERANCE, units
        assert relative(dense, expected) > 0.01, "the plan must matter"


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.usefixtures("example")
def test_saved_model_equals_loaded_model(layout: str, tmp_path: Path) -> None:
    model = tiny(NAME, layers=LAYERS)
    sites = find_sites(model)
    half = {site.name: tuple(range(site.units // 2)) for site in sites}
    plan = random_plan(model, seed=1) if layout == "per-layer" else Plan(half, dense_plan(sites).units)
    cut(model, plan, sites=sites)
    with torch.no_grad():
        expected = model(tokens()).logits
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout=layout, card="")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=written.needs_code).eval()
    assert sum(parameter.numel() for parameter in loaded.parameters()) == written.params
    with torch.no_grad():
        assert relative(loaded(tokens()).logits, expected) <= TOLERANCE
