"""Tiny random models of every family, their adapters and random plans."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from prunetune import Plan, find_sites
from prunetune.pruning import families
from prunetune.pruning.linears import get_base_linear, is_transposed
from prunetune.pruning.sites import lora_target_modules, unprunable_kinds
from prunetune.pruning.units import DEFAULT_UNITS, KIND_BY_NAME, UnitKind

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")  # for laws that take long
ALL_FAMILIES = tuple(families.FAMILIES)
VOCABULARY = 97
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Values of a family's configuration that differ from those shared by all.
OWN: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 12},
    "stablelm": {"head_dim": None, "hidden_size": 64},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48, "dropout": 0.0},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "falcon": {"head_dim": None, "ffn_hidden_size": 96},
    "mixtral": EXPERTS,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "gpt_oss": EXPERTS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "gpt2": {"head_dim": None, "n_inner": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def tiny_config(family: str, *, groups: int = 2, ratio: int = 2, layers: int = 3, **changes: Any) -> Any:
    """A configuration of a few thousand parameters; hidden size divisible by every head count used."""
    heads = groups * ratio
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family == "gemma3_text":
        values |= {"sliding_window": 8, "layer_types": [*(["sliding_attention"] * (layers - 1)), "full_attention"]}
    values |= OWN.get(family, {}) | changes
    return CONFIG_MAPPING[family](
        **{name: value for name, value in values.items() if (name, value) != ("head_dim", None)}
    )


def tiny(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random model whose biases and norms are random too, so that no term is trivially zero."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.2)
    return model


LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")} | {
    f"linear_{name}_head_dim": 8 for name in ("key", "value")
}
# Models whose layers also carry states through a sequence; none of them can be pruned yet.
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 96},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], **LINEAR},
    "qwen3_next": EXPERTS
    | {"layer_types": ["full_attention", "linear_attention", "full_attention"], **LINEAR}
    | {"shared_expert_intermediate_size": 32},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 24, "n_groups": 1},
}


def hybrid(family: str, **changes: Any) -> Any:
    """A tiny model of one of `HYBRIDS`."""
    return tiny(family, **(HYBRIDS[family] | changes))


def with_lora(model: Any, *, seed: int = 1, rank: int = 4) -> Any:
    """Random, non-zero adapters on every producer and consumer."""
    torch.manual_seed(seed)
    targets = lora_target_modules(model)
    transposed = is_transposed(get_base_linear(model, targets[0]))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@cache
def kinds_of(family: str) -> tuple[str, ...]:
    """The kinds of unit that a tiny model of this family can lose, as recipes name them, outer ones first."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    unprunable = unprunable_kinds(model, tuple(KIND_BY_NAME))
    return tuple(name for name, kind in KIND_BY_NAME.items() if kind not in unprunable)


def random_plan(model: Any, *, seed: int = 0, keep: float = 0.5, units: Collection[str] = DEFAULT_UNITS) -> Plan:
    """A random plan that respects floors and nesting, and that removes something."""
    rng = torch.Generator().manual_seed(seed)
    sites = {site.name: site for site in find_sites(model, units)}
    kept: dict[str, tuple[int, ...]] = {}
    for site in sites.values():
        outer = sites.get(site.parent)
        open_groups = site.open_parent_groups(kept[outer.name] if outer else None, outer.units if outer else 1)
        count = max(site.min_units_per_group, int((torch.rand(site.units_per_group, generator=rng) < keep).sum()))
        if not any(len(kept[name]) < sites[name].units for name in kept):
            count = max(site.min_units_per_group, min(count, site.units_per_group - 1))
        if site.kind in (UnitKind.EXPERT_CHANNEL, UnitKind.HIDDEN_CHANNEL):  # grouped kernels want rows of 16 bytes
            count = max(8, count - count % 8)
        order = torch.rand(site.parent_groups, site.units_per_group, generator=rng).argsort(1)[:, :count].tolist()
        kept[site.name] = tuple(
            sorted(group * site.units_per_group + unit for group in open_groups for unit in order[group])
        )
    return Plan(kept, {name: site.units for name, site in sites.items()})


def tokens(*, batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """[batch, length] random ids."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over largest magnitude."""
    return float((result - expected).abs().max() / expected.abs().max())
