"""Laws of uniform configurations: sizes of the cut model, and another family only where the own one cannot say them."""

from __future__ import annotations

from typing import Any

import pytest

from prunetune.errors import ModelError
from prunetune.export.checkpoint import (
    explain_family_change,
    kv_groups_validator,
    mlp_width_option,
    shrink_config,
    uniform_config_from_plan,
)
from prunetune.plan import Plan
from prunetune.pruning.sites import find_sites
from support.models import tiny, tiny_config


def sizes_of(config: Any) -> tuple[int, ...]:
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "hidden_size")
    return tuple(getattr(config, name) for name in names)


def test_widths_that_are_not_named_stay() -> None:
    config = tiny_config("llama", groups=3, ratio=2, hidden_size=72)
    assert sizes_of(shrink_config(config, None, None)) == (6, 3, 8, 96, 72)
    assert sizes_of(shrink_config(config, 2, None)) == (4, 2, 8, 96, 72)
    assert sizes_of(shrink_config(config, None, 40)) == (6, 3, 8, 40, 72)
    assert sizes_of(shrink_config(config, None, None, queries_per_kv_head=1)) == (3, 3, 8, 96, 72)
    assert sizes_of(shrink_config(config, 2, 64, queries_per_kv_head=1)) == (2, 2, 8, 64, 72)
    assert shrink_config(config, 2, None).architectures == ["LlamaForCausalLM"]
    mixture = shrink_config(tiny_config("qwen3_moe"), None, None, experts=3, expert_channels=24)
    assert (mixture.num_experts, mixture.moe_intermediate_size) == (3, 24)


@pytest.mark.parametrize(
    ("family", "changes", "groups", "written"),
    [
        ("llama", {}, 4, "LlamaForCausalLM"),
        ("llama", {}, 5, "MistralForCausalLM"),  # 5 heads do not divide 48
        ("qwen2", {}, 6, "Qwen2ForCausalLM"),
        ("qwen2", {}, 5, "SeedOssForCausalLM"),  # 5 heads of 8 are not 48
        ("qwen2", {"use_sliding_window": True}, 5, "Qwen2ForCausalLM"),
        ("qwen3", {}, 5, "Qwen3ForCausalLM"),
    ],
)
def test_another_family_is_written_only_where_the_own_one_cannot_say_the_heads(
    family: str, changes: dict[str, Any], groups: int, written: str
) -> None:
    dense = tiny_config(family, groups=6, ratio=1, **changes)
    config = shrink_config(dense, groups, None)
    assert config.architectures == [written]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (groups, groups, 8)
    note = explain_family_change(dense, config)
    assert note.startswith(f"written as {written}: ") == (type(config) is not type(dense))
    assert bool(note) == (type(config) is not type(dense))


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_heads_that_no_family_can_say_are_not_valid(bias: str) -> None:
    """Mistral has no biases, so a Llama with biases stays one, which refuses 5 heads."""
    is_valid = kv_groups_validator(tiny_config("llama", groups=6, ratio=1, **{bias: True}))
    assert [is_valid(groups) for groups in (0, 1, 2, 3, 4, 5, 6)] == [False, True, True, True, True, False, True]
    is_valid = kv_groups_validator(tiny_config("llama", groups=6, ratio=1))
    assert all(is_valid(groups) for groups in range(1, 7))
    assert not is_valid(0)


def test_query_heads_of_a_group_are_counted_too() -> None:
    is_valid = kv_groups_validator(tiny_config("llama", groups=2, ratio=4, attention_bias=True))
    assert is_valid(2, 4)
    assert is_valid(2, 3)  # 6 heads
    assert not is_valid(2, 5)  # 10 do not divide 48
    assert is_valid(1, 3)
    assert not is_valid(1, 5)


def test_groups_of_the_dense_model_are_valid_and_no_others_where_attention_cannot_be_pruned() -> None:
    single = kv_groups_validator(tiny_config("llama", groups=1, ratio=4))
    assert [single(groups) for groups in (0, 1)] == [False, True]
    whole = kv_groups_validator(tiny_config("olmo2", groups=2, ratio=2))  # its norm spans all heads
    assert [whole(groups) for groups in (0, 1, 2)] == [False, False, True]


def test_option_of_the_mlp_width_is_the_familys() -> None:
    assert mlp_width_option(tiny_config("llama")) == "intermediate_size"
    assert mlp_width_option(tiny_config("opt")) == "ffn_dim"


@pytest.mark.parametrize("widths", [(1, 2, 2), (0, 0, 0)])
def test_plan_of_other_than_equal_layers_is_no_uniform_one(widths: tuple[int, ...]) -> None:
    sites = find_sites(tiny())
    kept = {site.name: tuple(range(site.units if site.kind == "mlp" else widths[site.layer])) for site in sites}
    with pytest.raises(ModelError, match="needs one width of each kind: write it per-layer"):
        uniform_config_from_plan(tiny_config("llama"), Plan(kept, {site.name: site.units for site in sites}), sites)


def test_uniform_plan_of_nested_units_gives_widths_within_each_group() -> None:
    """Of 3 groups of 2 heads and 5 layers, 2 groups of one head and 4 layers are kept."""
    model = tiny("qwen3", groups=3, ratio=2, layers=5, hidden_size=72)
    sites = find_sites(model, ["layers", "kv-groups", "query-heads", "mlp-channels"])
    units = {"layers": (0,), "attention": (0, 2), "query-heads": (1, 4), "mlp": tuple(range(48))}
    kept = {site.name: units[site.kind] if site.layer != 3 else () for site in sites}
    config = uniform_config_from_plan(model.config, Plan(kept, {site.name: site.units for site in sites}), sites)
    assert sizes_of(config) == (2, 2, 8, 48, 72)


def test_family_of_the_same_arithmetic_adds_neither_dropout_nor_a_window() -> None:
    config = shrink_config(tiny_config("qwen2", groups=6, ratio=1), 5, None)
    assert (config.attention_bias, config.attention_out_bias) == (True, False)
    assert (config.attention_dropout, config.residual_dropout) == (0.0, 0.0)
    assert shrink_config(tiny_config("llama", groups=6, ratio=1), 5, None).sliding_window is None
