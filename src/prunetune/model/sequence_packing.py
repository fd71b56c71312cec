"""Attention over sequences that stand end to end in one row, each seeing only itself.

transformers hands `cu_seq_lens_q` and `max_length_q` down to whatever attention is registered: nothing is patched.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "prunetune_packed"
PROBE = 32  # tokens
CLOSE, EQUAL = 0.05, 1e-4  # the largest error of a logit, by the largest logit: in 16 bits and in float32
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10: nothing is packed there
    varlen_attn = None  # type: ignore[assignment]
# Query heads may share key-value heads: once silently (seen with 2.11), since then where it is said.
ASKS_FOR_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def supports_packing(model: Any) -> bool:
    """Whether two sequences in one row are to this model what they are apart: tried, not every class hands all down.

    No where its attention has what the kernel lacks (soft-capped scores, sinks), or positions that are not of
    `position_ids`.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped or not getattr(model, "_supports_attention_backend", False):
        return False
    training, half = model.training, model.dtype != torch.float32
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), torch.autocast(device.type, model.dtype, enabled=half):  # adapters are float32
            return _packed_matches_separate(model.eval(), device, rounded=half)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return False
    finally:
        model.train(training)


def _packed_matches_separate(model: Any, device: torch.device, *, rounded: bool) -> bool:
    """Whether a packed row gives what its parts give; in 16 bits, at least far more so than one long sequence does.

    There rounding alone may put single logits far apart, so their mean counts.
    """
    vocabulary, half = model.config.get_text_config().vocab_size, PROBE // 2
    ids = (3 + 7919 * torch.arange(PROBE, device=device))[None] % vocabulary
    bounds = torch.tensor([0, half, PROBE], dtype=torch.int32, device=device)
    marks = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": half, "max_length_k": half}
    positions = torch.arange(half, device=device).repeat(2)[None]
    apart = torch.cat([model(part, use_cache=False).logits for part in (ids[:, :half], ids[:, half:])], dim=1).float()
    with use_packed_attention(model):
        found = model(ids, position_ids=positions, use_cache=False, **marks).logits.float()
    error = (found - apart).abs()
    if error.max() <= (CLOSE if rounded else EQUAL) * apart.abs().max():
        return True
    seen = (model(ids, use_cache=False).logits.float() - apart)[:, half:].abs().mean()  # by a sequence that sees all
    return rounded and bool(error[:, half:].mean() <= seen / 4 and error[:, :half].mean() <= seen / 4)


@contextmanager
def use_packed_attention(model: Any) -> Iterator[None]:
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
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence: query [1, H, N, D], key and value [1, G, N, D] -> [1, N, H, D].

    `cu_seq_lens_q` int32 [S + 1] holds the bounds; `max_length_q` is at least the longest sequence's length.
    """
    if s_aux is not None:
        raise TypeError("attention sinks: the kernel has none")
    rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    attend = _flash if query.is_cuda else _one_by_one
    return attend(*rows, cu_seq_lens_q, max_length_q, scaling, sliding_window)[None], None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    left = -1 if window is None else window - 1
    grouped: dict[str, Any] = {"enable_gqa": True} if ASKS_FOR_GROUPS else {}
    result = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(left, 0), **grouped
    )
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
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
        parts.append(mixed.transpose(0, 1))
    return torch.cat(parts)
