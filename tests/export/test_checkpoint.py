"""Written checkpoints open in a fresh process, equal the gated model, and have the plan's parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from prunetune import Plan, cut, find_sites, masked
from prunetune.errors import PlanError, SelfCheckFailed
from prunetune.export import checkpoint
from prunetune.export.checkpoint import (
    add_old_rope_keys,
    kv_groups_validator,
    mlp_width_option,
    uniform_config_from_plan,
    write_checkpoint,
)
from prunetune.export.selfcheck import check_checkpoint, compute_logits
from prunetune.model.loading import load_model_and_tokenizer
from prunetune.model.provenance import PruningRun, read_history
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select
from support.data import subwords
from support.models import ALL_FAMILIES, FAMILIES, random_plan, relative, tiny, tokens, with_lora


def uniform_plan(model: Any, keep: float) -> Plan:
    sites = find_sites(model)
    rng = torch.Generator().manual_seed(3)
    scores = {site.name: torch.randn(site.units, generator=rng) for site in sites}
    return select(
        scores, sites, keep, PlanConstraints("uniform", align=8, allows_groups=kv_groups_validator(model.config))
    )


def cut_after_gating(model: Any, plan: Plan) -> torch.Tensor:
    """Cut the model in place; returns the logits of the gated model."""
    with_lora(model)
    with masked(model, plan):
        expected = compute_logits(model, tokens())
    cut(model, plan)
    return expected


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_equals_gated_model_in_a_fresh_process(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny(family, tie_word_embeddings=family in ("qwen2", "gemma3_text"))
    sites = find_sites(model)
    plan = uniform_plan(model, 0.6) if layout == "uniform" else random_plan(model)
    expected = cut_after_gating(model, plan)
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout=layout, card="# card\n")
    result = check_checkpoint(written, tokens(), expected)
    assert result.max_relative <= 1e-5
    assert written.needs_code == (layout == "per-layer")
    assert Plan.load(tmp_path / "model" / "plan.json") == plan
    assert "rope_theta" in (tmp_path / "model" / "config.json").read_text()


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_head_of_its_own_is_written_as_such_though_the_configuration_said_tied(layout: str, tmp_path: Path) -> None:
    dense = tiny()
    dense.config.tie_word_embeddings = True
    dense.save_pretrained(tmp_path / "dense")
    subwords().save_pretrained(tmp_path / "dense")
    head = load_file(tmp_path / "dense" / "model.safetensors")["lm_head.weight"]
    model = load_model_and_tokenizer(str(tmp_path / "dense"), device=torch.device("cpu"), dtype=torch.float32).model
    plan = uniform_plan(model, 0.6)
    sites = find_sites(model)
    cut(model, plan)
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout=layout, card="")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(written.folder / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_checkpoint_of_every_family_equals_gated_model(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny(family)
    sites = find_sites(model)
    if (family, layout) == ("bloom", "uniform"):
        with pytest.raises(PlanError, match="no option for the width of an MLP: use layout per-layer"):
            mlp_width_option(model.config)
        return
    plan = uniform_plan(model, 0.6) if layout == "uniform" else random_plan(model)
    expected = cut_after_gating(model, plan)
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / family, layout=layout, card="")
    reopened = AutoModelForCausalLM.from_pretrained(written.folder, trust_remote_code=written.needs_code).eval()
    assert sum(parameter.numel() for parameter in reopened.parameters()) == written.params
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-5


def test_uniform_plan_of_query_heads_has_their_number_in_each_group() -> None:
    """Of 2 groups of 3 heads, 2 heads each."""
    model = tiny("qwen3", groups=2, ratio=3)
    sites = find_sites(model, ["query-heads"])
    plan = Plan({site.name: (0, 2, 4, 5) for site in sites}, {site.name: 6 for site in sites})
    config = uniform_config_from_plan(model.config, plan, sites)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


def test_kv_groups_validator_builds_one_model_for_each_new_width(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    monkeypatch.setattr(
        checkpoint, "build_meta_model", lambda config: built.append(config.num_key_value_heads) or tiny("qwen3")
    )
    is_valid = kv_groups_validator(tiny("qwen3", groups=4).config)
    assert not built
    assert [is_valid(2), is_valid(2), is_valid(4), is_valid(0)] == [True, True, True, False]
    assert built == [2]


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_no_default_dtype_changes_while_a_bfloat16_model_is_planned_and_written(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to the process: cells in other threads would make their tensors in it."""
    model, defaults = tiny("llama").bfloat16(), []
    model.config.dtype = torch.bfloat16
    sites = find_sites(model)
    monkeypatch.setattr(torch, "set_default_dtype", defaults.append)
    assert kv_groups_validator(model.config)(1)
    plan = Plan({site.name: tuple(range(site.units // 2)) for site in sites}, {site.name: site.units for site in sites})
    written = write_checkpoint(
        cut(model, plan, sites=sites), subwords(), plan, sites, tmp_path / "model", layout=layout, card=""
    )
    assert json.loads((written.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert set(defaults) == {torch.float32}


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_checkpoint_keeps_rope_scaling_of_the_dense_model(kind: str, layout: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 32}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    model = tiny("llama", rope_parameters=rope)
    sites = find_sites(model)
    plan = uniform_plan(model, 0.6) if layout == "uniform" else random_plan(model)
    expected = cut_after_gating(model, plan)
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / kind, layout=layout, card="")
    reopened = AutoModelForCausalLM.from_pretrained(written.folder, trust_remote_code=written.needs_code).eval()
    assert relative(compute_logits(reopened, tokens()), expected) <= 1e-5


def test_llama_is_written_as_mistral_if_heads_do_not_divide_hidden_size(tmp_path: Path) -> None:
    model = tiny("llama", groups=6, ratio=1, hidden_size=48)
    sites = find_sites(model)
    widths = {site.name: range(5) if site.kind == "attention" else range(64) for site in sites}
    plan = Plan({name: tuple(units) for name, units in widths.items()}, {site.name: site.units for site in sites})
    expected = cut_after_gating(model, plan)
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout="uniform", card="")
    assert written.architecture == "MistralForCausalLM"
    assert "refuses 5 heads" in written.note
    assert json.loads((tmp_path / "model" / "config.json").read_text())["sliding_window"] is None
    assert check_checkpoint(written, tokens(), expected).max_relative <= 1e-5


def test_select_keeps_valid_head_counts_without_an_equivalent_family() -> None:
    model = tiny("gemma3_text", groups=6, ratio=1, hidden_size=48)
    groups = len(uniform_plan(model, 0.9).kept["model.layers.0.self_attn"])
    assert 48 % groups == 0


def test_layer_without_attention_is_written_as_skip_and_opens(tmp_path: Path) -> None:
    model = tiny("llama")
    sites = find_sites(model)
    plan = random_plan(model)
    plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
    expected = cut_after_gating(model, plan)
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout="per-layer", card="")
    assert check_checkpoint(written, tokens(), expected).max_relative <= 1e-5
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["per_layer_config"]["01"]["skip"] == ["attention"]


def test_self_check_fails_on_a_changed_weight_or_damaged_file(tmp_path: Path) -> None:
    model = tiny("mistral")
    plan = uniform_plan(model, 0.6)
    sites = find_sites(model)
    expected = cut_after_gating(model, plan)
    written = write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout="uniform", card="")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][0] *= 1.5
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SelfCheckFailed, match="differs from the gated model"):
        check_checkpoint(written, tokens(), expected)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SelfCheckFailed, match="does not open"):
        check_checkpoint(written, tokens(), expected)


def test_bfloat16_checkpoint_gives_the_same_logits_to_the_bit(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    plan = uniform_plan(model, 0.7)
    sites = find_sites(model)
    cut_after_gating(model, plan)
    for parameter in model.parameters():  # as a checkpoint does it: rotary buffers stay float32
        parameter.data = parameter.data.bfloat16()
    write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout="uniform", card="")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert reopened.dtype == torch.bfloat16
    assert torch.equal(reopened(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("known", [None, 2, [2], [2, 5], [9, 5]])
def test_end_token_is_added_to_eos_tokens_of_generation_config(known: Any, layout: str, tmp_path: Path) -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = known
    plan, tokenizer = uniform_plan(model, 0.7), subwords()
    cut(model, plan)
    assert tokenizer.eos_token_id == 2
    for name, end_token in (("unchanged", None), ("chat", 5)):
        write_checkpoint(
            model,
            tokenizer,
            plan,
            find_sites(tiny("llama")),
            tmp_path / name,
            layout=layout,
            card="",
            end_token=end_token,
        )
    unchanged, chat = (GenerationConfig.from_pretrained(tmp_path / name).eos_token_id for name in ("unchanged", "chat"))
    assert unchanged == model.generation_config.eos_token_id == known
    assert chat == ([9, 5] if known == [9, 5] else [2, 5])


def test_old_readers_find_their_rope_keys(tmp_path: Path) -> None:
    """transformers 4 reads `rope_theta` and `rope_scaling`; without them it takes a theta of 10,000, unscaled."""
    file = tmp_path / "config.json"
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for rope, scaling in ((scaled, scaled), ({"rope_type": "default"}, None), ({}, None)):
        file.write_text(json.dumps({"hidden_size": 8, "rope_parameters": {**rope, "rope_theta": 5e4}}))
        add_old_rope_keys(file)
        values = json.loads(file.read_text())
        assert (values["rope_theta"], values["rope_scaling"]) == (5e4, scaling)
        assert (values["hidden_size"], values["rope_parameters"]) == (8, {**rope, "rope_theta": 5e4})
    file.write_text(json.dumps({"hidden_size": 8}))  # a model with learned positions
    add_old_rope_keys(file)
    assert json.loads(file.read_text()) == {"hidden_size": 8}


def test_checkpoint_has_the_given_files_weights_and_runs(tmp_path: Path) -> None:
    """Weights that are finished are moved into it, and the model's own are not written."""
    model = tiny("llama")
    sites, plan = find_sites(model), uniform_plan(model, 0.7)
    cut(model, plan)
    plain = write_checkpoint(model, subwords(), plan, sites, tmp_path / "plain", layout="uniform", card="")
    assert read_history(str(plain.folder)) == ()
    shards, image = tmp_path / "shards", tmp_path / "preprocessor_config.json"
    shards.mkdir()
    finished = {name: weight + 1 for name, weight in load_file(plain.folder / "model.safetensors").items()}
    save_file(finished, shards / "model.safetensors", {"format": "pt"})
    image.write_text("{}\n")
    runs = tuple(PruningRun(f"run {index}", "uniform", 0.7, 1000, 9) for index in range(2))
    written = write_checkpoint(
        model, subwords(), plan, sites, tmp_path / "model", layout="uniform", card="", shards=shards,
        processor_files=[image], history=runs,
    )  # fmt: skip
    assert read_history(str(written.folder)) == runs
    assert (written.folder / image.name).read_bytes() == image.read_bytes()
    assert not shards.exists()
    weights = load_file(written.folder / "model.safetensors")
    assert weights.keys() == finished.keys()
    assert all(torch.equal(weight, finished[name]) for name, weight in weights.items())
    assert (written.params, written.bytes) == (plain.params, plain.bytes)
