"""Attention over sequences that stand end to end in one row, each seeing only itself.

transformers hands `cu_seq_lens_q` and `max_length_q` down to whatever attention is registered: nothing is patched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "prunetune_packed"


def can_pack(model: Any) -> bool:
    """Whether this model takes registered attention, without what its kernel lacks (soft-capped scores, sinks)."""
    text = model.config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    return bool(getattr(model, "_supports_attention_backend", False)) and not capped and text.model_type != "gpt_oss"


@contextmanager
def packed_rows(model: Any) -> Iterator[None]:
    """For the block, the model attends within the sequences that `bounds` marks, see `packed_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    text = model.config.get_text_config()
    before = text._attn_implementation
    text._attn_implementation = NAME
    try:
        yield
    finally:
        text._attn_implementation = before


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence: query [1, H, N, D], key and value [1, G, N, D] -> [1, N, H, D].

    `cu_seq_lens_q` int32 [S + 1] holds the bounds; `max_length_q` is at least the longest sequence's length.
    """
    ratio = query.shape[1] // key.shape[1]
    if ratio > 1:
        key, value = key.repeat_interleave(ratio, dim=1), value.repeat_interleave(ratio, dim=1)
    rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    attend = _flash if query.is_cuda else _one_by_one
    return attend(*rows, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    result = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(left, 0))
    assert isinstance(result, Tensor)
    return result


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """The same without the kernel: for tests on a CPU."""
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        seen = (back >= 0) & (back < (window or end - start + 1))
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(parts)
