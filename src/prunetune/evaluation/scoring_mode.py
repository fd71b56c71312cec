"""How a model is run for scoring: evaluation mode, attention kernels, sizes, which sequences share a pass, padding."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
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


MAX_LOGITS_PER_PASS = 2**27  # half a GiB in float32
EFFICIENT_PASS_TOKENS = 1024  # beyond this a larger pass is hardly faster, so that padding is what costs
MAX_LENGTH_RATIO = 1.2  # longest to shortest sequence of a pass with more tokens than that
T = TypeVar("T")
OnItemsDone = Callable[[int], None]  # called with how many more items are done


def batch_by_length(
    items: Sequence[T],
    length: Callable[[T], int],
    fits: Callable[[int, int], bool],
    *,
    max_length_ratio: float = math.inf,
) -> Iterator[list[T]]:
    """Batches of items of similar length, for which `fits(rows, longest)` holds; an item that fits nowhere is alone.

    A batch of `EFFICIENT_PASS_TOKENS` takes no item more than `max_length_ratio` times as long as its shortest.
    """
    group: list[T] = []
    for item in sorted(items, key=length):
        longest = length(item)
        if group and (
            not fits(len(group) + 1, longest)
            or (len(group) * longest >= EFFICIENT_PASS_TOKENS and longest > max_length_ratio * length(group[0]))
        ):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences padded to the longest of them; every tensor is [rows, longest]."""

    input_ids: Tensor
    attention_mask: Tensor  # 1 for a token, 0 for padding
    position_ids: Tensor  # 0 at each sequence's first token


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> PaddedBatch:
    """Pad on the left, so that the last column predicts the next token of every sequence."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[pad_id] * (width - len(sequence)) + list(sequence) for sequence in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences], device=device)
    return PaddedBatch(ids, mask, position_ids_from_mask(mask))


def position_ids_from_mask(mask: Tensor) -> Tensor:
    """Attention mask [rows, length] -> the position of each token among the tokens of its row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
