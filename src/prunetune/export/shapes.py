"""Which shapes a stock configuration class accepts, decided before training so that no run ends in a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Configurations that demand a hidden size divisible by the number of query heads, head_dim given or not
# (transformers 5.23). Llama has a sibling without the rule: see `write.uniform_config`.
DIVIDES_HIDDEN = ("gemma3_text",)


def legal_groups(config: Any) -> Callable[[int], bool]:
    """Whether a uniform model of this architecture may keep so many KV groups in every layer."""
    ratio = config.num_attention_heads // config.num_key_value_heads
    strict = config.model_type in DIVIDES_HIDDEN or (config.model_type == "llama" and has_bias(config))

    def legal(groups: int) -> bool:
        return groups >= 1 and (not strict or config.hidden_size % (groups * ratio) == 0)

    return legal


def has_bias(config: Any) -> bool:
    """Llama's optional biases, which Mistral lacks."""
    return bool(getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False))
