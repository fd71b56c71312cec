"""How a model is run for scoring: evaluation mode, attention kernels, and the sizes of its context and vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunetune.model.lm_head import select_head_inputs

# cuDNN's attention is left out: it answers a wholly masked row, as padding on the left makes them, with NaN.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

NO_LIMIT = 2**20  # tokens


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients; afterwards restore the mode of every module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), sdpa_kernel(SDPA_BACKENDS), select_head_inputs(model):
            yield
    finally:
        for module in training:
            module.training = True


def has_plain_cache(model: Any) -> bool:
    """Whether its cache holds keys and values only, which may be padded on the left and continued in several ways.

    Hybrids and state-space models carry states of convolutions and recurrences through a sequence, padding included.
    """
    from transformers import DynamicCache

    layers = DynamicCache(config=model.config).layers
    return not getattr(model, "_is_stateful", False) and not any(hasattr(layer, "conv_states") for layer in layers)


def context_length(model: Any) -> int:
    """Longest sequence in tokens that the model was made for; `NO_LIMIT` where its positions have no end."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None) or NO_LIMIT)


def max_prompt_tokens(model: Any, reserved_tokens: int) -> int:
    """Longest prompt that leaves `reserved_tokens` of the context free; at least half the context."""
    return max(context_length(model) - reserved_tokens, context_length(model) // 2)


def vocab_size(model: Any) -> int:
    """Logits per position."""
    return int(model.config.get_text_config().vocab_size)
