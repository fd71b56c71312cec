"""Checks of config.json: values that no model can have, and models that cannot be pruned, told before any is built."""

from collections.abc import Mapping
from typing import Any

from prunetune.errors import ModelError, UnknownArchitecture
from prunetune.pruning.families import FAMILIES, MODEL_TYPE_PREFIX, get_family
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


def check_per_layer_keys(name: str, values: Mapping[str, Any]) -> None:
    """Raises `ModelError` for a `per_layer_config` of another tool that says more than how wide layers are."""
    family = FAMILIES[values["model_type"]]
    known = {"num_attention_heads", "num_key_value_heads", family.intermediate_size_key, "skip"}
    for layer in values["per_layer_config"].values():
        if unknown := set(layer) - known or set(layer.get("skip", ())) - {"attention", "mlp"}:
            raise ModelError(
                f"model {name}: per_layer_config names {min(unknown)}, and layers may differ here in "
                f"{', '.join(sorted(known))} (attention, mlp) alone: name the model that it was made from"
            )


def _wrong_value(name: str, key: str, values: Mapping[str, Any], accepted: str) -> ModelError:
    return ModelError(
        f"model {name}: config.json: {key} is {short_repr(values[key])}, and must be {accepted}; {CORRECT_CONFIG}"
    )


DEQUANTIZED = ("fp8", "mxfp4")  # methods whose weights transformers dequantises anywhere, without another package


def raise_if_unprunable(name: str, values: Mapping[str, Any]) -> None:
    """Raises `ModelError` for checkpoints that may open, and that no plan can cut: quantised ones."""
    inner = values.get("text_config")
    for part in (values, inner if isinstance(inner, Mapping) else {}):
        stored = part.get("quantization_config") or part.get("compression_config")
        method = stored.get("quant_method") if isinstance(stored, Mapping) else None
        if stored and (part is not values or method not in DEQUANTIZED):
            raise quantised_error(name, f"by {method or 'bitsandbytes'} (quantization_config in config.json)")


def quantised_error(name: str, how: str) -> ModelError:
    """The refusal of a model whose weights are no plain floats."""
    return ModelError(
        f"model {name}: its weights are quantised {how}, and cannot be pruned: name the unquantised model"
    )


def is_multimodal(config: Any) -> bool:
    """Whether the language model lies inside another model that takes images, by a class of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    is_inside = config.get_text_config() is not config
    return is_inside and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that opens a model of this configuration whole."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if is_multimodal(config) else AutoModelForCausalLM


def raise_unless_causal_lm(name: str, config: Any) -> None:
    """Raises `ModelError` where transformers has no causal language model of this configuration, with images or not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    has_own_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    model_type = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    if getattr(config, "is_encoder_decoder", False) and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"model {name}: {config.model_type!r} has an encoder: name a decoder, a causal language model")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or has_own_class or is_multimodal(config):
        return
    raise_if_unknown_inside(name, config)
    raise ModelError(f"model {name}: {config.model_type!r} is no causal language model: name one")


def raise_if_unknown_inside(name: str, config: Any) -> None:
    """Raises `ModelError` for a multimodal model that takes no images, or whose language model cannot be pruned."""
    text = config.get_text_config()
    if text is config:
        return
    try:
        get_family(config)
        if is_multimodal(config):
            return
        advice = "save its language model by itself, and name that folder"
    except UnknownArchitecture:
        advice = f"which cannot be pruned either; can be: {', '.join(FAMILIES)}"
    raise ModelError(
        f"model {name}: {config.model_type!r} is a multimodal model, with the language model {text.model_type!r} "
        f"inside: {advice}"
    )
