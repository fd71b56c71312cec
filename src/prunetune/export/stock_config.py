"""Uniform configurations of stock classes: which widths a class accepts, and the configuration of a cut model.

What a class accepts is asked before training, so that no run ends with a checkpoint that cannot be written.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunetune.errors import PlanError
from prunetune.model.per_layer_code import build_meta_model
from prunetune.pruning.families import get_family, head_counts, num_experts_key
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import UnitKind


def kv_groups_validator(config: Any) -> Callable[..., bool]:
    """A function that says whether a uniform model of this architecture may keep `(kv_groups, queries_per_kv_head)`.

    It builds a model without weights of that shape, and compares the width of its heads with the dense model's: some
    classes demand a hidden size that the heads divide, others derive the head dimension from it. Answers are cached.
    Building a model changes settings of the whole process, so the first call must not be in a thread.
    """
    heads = head_counts(config)

    @functools.cache
    def is_valid(kv_groups: int, queries_per_kv_head: int = heads.queries_per_kv_head) -> bool:
        if (kv_groups, queries_per_kv_head) == (heads.kv_heads, heads.queries_per_kv_head) or kv_groups < 1:
            return kv_groups >= 1
        try:
            model = build_meta_model(shrink_config(config, kv_groups, None, queries_per_kv_head=queries_per_kv_head))
            site = next((site for site in find_sites(model) if site.kind is UnitKind.KV_GROUP), None)
        except Exception:  # each class refuses in its own way
            return False
        if site is None or site.consumer is None:  # attention cannot be pruned
            return False
        return (site.units, site.consumer.rows_per_unit) == (kv_groups, queries_per_kv_head * heads.head_dim)

    return is_valid


def shrink_config(
    config: Any,
    kv_groups: int | None,
    mlp_channels: int | None,
    *,
    queries_per_kv_head: int | None = None,
    experts: int | None = None,
    expert_channels: int | None = None,
) -> Any:
    """The configuration with smaller, equal layers; None keeps a width.

    If the family's own class cannot carry the head count, the configuration is that of its `EquivalentFamily`.
    """
    from transformers import CONFIG_MAPPING

    if (text := config.get_text_config()) is not config:  # inside a multimodal model
        wrapper = copy.deepcopy(config)
        wrapper.text_config = shrink_config(
            text,
            kv_groups,
            mlp_channels,
            queries_per_kv_head=queries_per_kv_head,
            experts=experts,
            expert_channels=expert_channels,
        )
        return wrapper
    values, dense = config.to_dict(), head_counts(config)
    kv_heads = dense.kv_heads if kv_groups is None else kv_groups
    heads = kv_heads * (queries_per_kv_head or dense.queries_per_kv_head)
    values.pop("transformers_version", None)
    if kv_groups is not None or queries_per_kv_head is not None:
        values |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dense.head_dim}
    if experts is not None:
        values[num_experts_key(config)] = experts
    if expert_channels is not None:
        values[get_family(config).mixture.intermediate_size_key] = expert_channels  # type: ignore[union-attr]
    if mlp_channels is not None:
        values[mlp_width_option(config)] = mlp_channels
    equivalent = EQUIVALENT_FAMILIES.get(config.model_type)
    if equivalent is None or not equivalent.is_needed(config, heads, dense.head_dim):
        return type(config).from_dict(values | {"architectures": [_causal_class(config)]})
    shared = {name: value for name, value in values.items() if name not in equivalent.removed_options}
    shared |= {"model_type": equivalent.model_type, **equivalent.values}
    changed = CONFIG_MAPPING[equivalent.model_type].from_dict(shared)
    changed.architectures = [_causal_class(changed)]
    return changed


@dataclass(frozen=True)
class EquivalentFamily:
    """A family with the same tensors and arithmetic, for head counts that a family's own configuration cannot carry."""

    model_type: str
    is_needed: Callable[[Any, int, int], bool]  # configuration, query heads, head dimension
    reason: str  # why the family's own configuration cannot, for `explain_family_change`
    removed_options: tuple[str, ...]  # options of the family that this one lacks
    values: Mapping[str, Any]  # options that this one adds


def _does_not_divide(config: Any, heads: int, _: int) -> bool:
    biased = config.attention_bias or config.mlp_bias
    return bool(config.hidden_size % heads) and not biased  # Mistral has no biases


def _is_not_square(config: Any, heads: int, head_dim: int) -> bool:
    return bool(heads * head_dim != config.hidden_size) and not config.use_sliding_window


EQUIVALENT_FAMILIES: Mapping[str, EquivalentFamily] = {
    "llama": EquivalentFamily(
        model_type="mistral",
        is_needed=_does_not_divide,
        reason="refuses {heads} heads at hidden size {hidden}",
        removed_options=("attention_bias", "mlp_bias", "pretraining_tp"),
        values={"sliding_window": None},
    ),
    "qwen2": EquivalentFamily(
        model_type="seed_oss",
        is_needed=_is_not_square,
        reason="means heads of {hidden} / {heads} in vLLM, llama.cpp and mlx-lm, and these have {size} rows",
        removed_options=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        values={"attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
}


def explain_family_change(config: Any, written: Any) -> str:
    """Why the written configuration has another class than the dense one; "" if it has the same."""
    if type(config) is type(written):
        return ""
    heads = head_counts(written)
    reason = EQUIVALENT_FAMILIES[config.model_type].reason.format(
        heads=heads.query_heads, size=heads.head_dim, hidden=config.hidden_size
    )
    return (
        f"written as {written.architectures[0]}: {type(config).__name__} {reason}; tensors and arithmetic are the same"
    )


def mlp_width_option(config: Any) -> str:
    """The configuration's option for the width of the MLP; raises `PlanError` if it has none."""
    option = get_family(config).intermediate_size_key
    if not option:
        raise PlanError(f"{config.model_type} has no option for the width of an MLP: use layout per-layer")
    return option


def _causal_class(config: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)  # type: ignore[no-any-return]
