"""Checks of config.json: values that no model can have, and models that cannot be pruned, told before any is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunetune.errors import ModelError
from prunetune.pruning.families import FAMILIES
from prunetune.utils.untrusted import short_repr

CORRECT_CONFIG = "correct config.json, or fetch it again"
FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Far above those of any model: every layer and unit takes time, even of a model without weights.
MAXIMA = {"num_hidden_layers": 512, "n_layer": 512, "num_layers": 512, "intermediate_size": 2**18}
# Values that count something, and so are 1 or more.
COUNTS = (
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


def check_config_values(name: str, values: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Raises `ModelError` for values of a model's config.json that would fail or do harm where they are used."""
    kernels = str(values.get("attn_implementation") or values.get("_attn_implementation") or "")
    if "/" in kernels and not trust_remote_code:
        raise ModelError(
            f"model {name}: config.json asks for attention code of the hub ({kernels}): remove attn_implementation, or "
            "read that code, then say --trust-remote-code"
        )
    if not isinstance(values.get("model_type", ""), str):
        raise _wrong_value(name, "model_type", values, "the name of an architecture")
    if "text_config" in values and not isinstance(values["text_config"], Mapping):
        raise _wrong_value(name, "text_config", values, "a configuration")
    for key in ("dtype", "torch_dtype"):
        if values.get(key) not in (None, *FLOAT_DTYPES) and not isinstance(values[key], Mapping):
            raise _wrong_value(name, key, values, f"one of {', '.join(FLOAT_DTYPES)}")
    for key in COUNTS:
        if isinstance(values.get(key), int) and values[key] < 1:
            raise _wrong_value(name, key, values, "1 or more")
    for part in (values, values.get("text_config") or {}):
        for key, largest in MAXIMA.items():
            if isinstance(part.get(key), int) and part[key] > largest:
                raise _wrong_value(name, key, part, f"{largest} or less")


def _wrong_value(name: str, key: str, values: Mapping[str, Any], accepted: str) -> ModelError:
    return ModelError(
        f"model {name}: config.json: {key} is {short_repr(values[key])}, and must be {accepted}; {CORRECT_CONFIG}"
    )


def raise_if_unprunable(name: str, values: Mapping[str, Any]) -> None:
    """Raises `ModelError` for checkpoints that may open, and that no plan can cut: of mixed widths, or quantised."""
    family = str(values.get("model_type"))  # some stock classes have layers of several sizes themselves: Gemma 4
    if "per_layer_config" in values and (family.startswith("pruned_") or family in FAMILIES):
        raise ModelError(
            f"model {name}: a result of layout per-layer cannot be pruned again: name the dense model that it was cut "
            "from, or prune a result of --layout uniform"
        )
    inner = values.get("text_config")
    for part in (values, inner if isinstance(inner, Mapping) else {}):
        if stored := part.get("quantization_config") or part.get("compression_config"):
            method = stored.get("quant_method") if isinstance(stored, Mapping) else None
            raise quantised_error(name, f"by {method or 'bitsandbytes'} (quantization_config in config.json)")


def quantised_error(name: str, how: str) -> ModelError:
    """The refusal of a model whose weights are no plain floats."""
    return ModelError(
        f"model {name}: its weights are quantised {how}, and cannot be pruned: name the unquantised model"
    )


def raise_unless_causal_lm(name: str, config: Any) -> None:
    """Raises `ModelError` where transformers has no causal language model of this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    has_own_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or has_own_class:
        return
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model {name}: {config.model_type!r} has an encoder: name a decoder, a causal language model")
    raise_if_multimodal(name, config)
    raise ModelError(f"model {name}: {config.model_type!r} is no causal language model: name one")


def raise_if_multimodal(name: str, config: Any) -> None:
    """Raises `ModelError` where the language model lies inside another model, with images or sounds around it."""
    text = config.get_text_config()
    if text is config:
        return
    advice = "save its language model by itself, as docs/quickstart.md says, and name that folder"
    if text.model_type not in FAMILIES:
        advice = f"which cannot be pruned either; can be: {', '.join(FAMILIES)}"
    raise ModelError(
        f"model {name}: {config.model_type!r} is a multimodal model, with the language model {text.model_type!r} "
        f"inside: {advice}"
    )
