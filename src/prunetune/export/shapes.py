"""Which shapes a stock configuration class accepts, found out before training so that no run ends in a refusal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from prunetune.errors import PlanError
from prunetune.model.families import experts_of, family_of, heads_of
from prunetune.model.sites import find_sites


def legal_groups(config: Any) -> Callable[..., bool]:
    """Whether a uniform model of this architecture may keep so many KV groups, of so many query heads, in every layer.

    Asked of the class itself: an empty model of that shape has to be made, and its heads to be as wide as before.
    Some classes demand a hidden size divisible by the heads, others derive the head dimension from it. Making a model
    changes settings of the whole process, so the first time is not for threads. What was found is remembered.
    """
    heads = heads_of(config)

    @functools.cache
    def legal(groups: int, ratio: int = heads.ratio) -> bool:
        if (groups, ratio) == (heads.groups, heads.ratio) or groups < 1:
            return groups >= 1
        try:
            found = _query_columns(uniform(config, groups, None, ratio=ratio))
        except Exception:  # each class says no in its own way
            return False
        return found == (groups, ratio * heads.size)

    return legal


def _query_columns(config: Any) -> tuple[int, int]:
    """(KV groups, columns that one group's queries have); zeros where attention cannot be pruned."""
    site = next((site for site in find_sites(empty(config)) if site.kind == "attention"), None)
    return (site.units, site.consumer.per_unit) if site and site.consumer else (0, 0)


def empty(config: Any) -> Any:
    """A causal language model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def uniform(
    config: Any,
    groups: int | None,
    channels: int | None,
    *,
    ratio: int | None = None,
    experts: int | None = None,
    expert_channels: int | None = None,
) -> Any:
    """The configuration of equal, smaller layers, None leaving a width as it is; Mistral's where Llama's refuses.

    `ratio` is the query heads of a KV group.
    """
    from transformers import MistralConfig

    values, dense = config.to_dict(), heads_of(config)
    heads = (dense.groups if groups is None else groups) * (ratio or dense.ratio)
    values.pop("transformers_version", None)
    if groups is not None or ratio is not None:
        kept = dense.groups if groups is None else groups
        values |= {"num_attention_heads": heads, "num_key_value_heads": kept, "head_dim": dense.size}
    if experts is not None:
        values[experts_of(config)] = experts
    if expert_channels is not None:
        values[family_of(config).mixture.width] = expert_channels  # type: ignore[union-attr]
    if channels is not None:
        values[width_of(config)] = channels
    if config.model_type == "llama" and config.hidden_size % heads and not has_bias(config):
        values |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        return MistralConfig.from_dict(
            {k: v for k, v in values.items() if k not in ("attention_bias", "mlp_bias", "pretraining_tp")}
        )
    return type(config).from_dict(values | {"architectures": [_causal_class(config)]})


def width_of(config: Any) -> str:
    """The configuration's name for the channels of an MLP; raises `PlanError` where it has none."""
    width = family_of(config).width
    if not width:
        raise PlanError(f"{config.model_type} has no option for the width of an MLP: use layout per-layer")
    return width


def has_bias(config: Any) -> bool:
    """Llama's optional biases, which Mistral lacks."""
    return bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))


def _causal_class(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
