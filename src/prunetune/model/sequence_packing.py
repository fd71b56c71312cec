"""Sequence packing: attention over sequences that lie end to end in one row, each attending only to itself.

transformers passes `cu_seq_lens_q` and `max_length_q` to the registered attention function, so nothing is patched.
Shapes: N tokens of a row, S sequences, H query heads, G key-value heads, D numbers of a head.
"""

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ATTENTION_NAME = "prunetune_packed"
PROBE_TOKENS = 32
# The largest error of a logit relative to the largest logit that counts as equal: in 16 bits, in float32.
TOLERANCE_16_BITS, TOLERANCE_32_BITS = 0.05, 1e-4
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10, where packing is not used
    varlen_attn = None  # type: ignore[assignment]
# Whether grouped-query attention has to be asked for; PyTorch 2.11 had no such argument and took it silently.
HAS_ENABLE_GQA = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def supports_packing(model: Any) -> bool:
    """Whether the model gives two packed sequences the logits that they have apart, by a trial on a few tokens.

    False where attention needs what the kernel lacks (soft-capped scores, sinks), or takes positions from elsewhere
    than `position_ids`.
    """
    has_soft_cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if has_soft_cap or not getattr(model, "_supports_attention_backend", False):
        return False
    training, is_16_bit = model.training, model.dtype != torch.float32
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), torch.autocast(device.type, model.dtype, enabled=is_16_bit):  # adapters are float32
            model.eval()
            vocab_size, half = model.config.get_text_config().vocab_size, PROBE_TOKENS // 2
            ids = (3 + 7919 * torch.arange(PROBE_TOKENS, device=device))[None] % vocab_size
            bounds = torch.tensor([0, half, PROBE_TOKENS], dtype=torch.int32, device=device)
            packing = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": half, "max_length_k": half}
            positions = torch.arange(half, device=device).repeat(2)[None]
            halves = (ids[:, :half], ids[:, half:])
            separate = torch.cat([model(sequence, use_cache=False).logits for sequence in halves], dim=1).float()
            with use_packed_attention(model):
                packed = model(ids, position_ids=positions, use_cache=False, **packing).logits.float()
            error = (packed - separate).abs()
            if error.max() <= (TOLERANCE_16_BITS if is_16_bit else TOLERANCE_32_BITS) * separate.abs().max():
                return True
            # In 16 bits, rounding alone may move single logits far. There it is enough that the mean error of both
            # sequences is at most a quarter of the error that attending to the other sequence would make.
            unpacked_error = (model(ids, use_cache=False).logits.float() - separate)[:, half:].abs().mean()
            limit = unpacked_error / 4
            return is_16_bit and bool(error[:, half:].mean() <= limit and error[:, :half].mean() <= limit)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return False
    finally:
        model.train(training)


@contextmanager
def use_packed_attention(model: Any) -> Iterator[None]:
    """For the block, the model attends only inside each packed sequence, see `packed_attention`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION_NAME
    try:
        yield
    finally:
        config._attn_implementation = before


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

    `cu_seq_lens_q` int32 [S + 1] holds the bounds of the sequences; none is longer than `max_length_q`. Raises
    `TypeError` with attention sinks.
    """
    if s_aux is not None:
        raise TypeError("attention sinks are not supported by the kernel for packed sequences")
    rows = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    bounds, longest = cu_seq_lens_q, max_length_q
    if not query.is_cuda:
        return _attend_one_by_one(*rows, bounds, longest, scaling, sliding_window)[None], None
    options: dict[str, Any] = {"window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    options |= {"enable_gqa": True} if HAS_ENABLE_GQA else {}
    result = varlen_attn(*rows, bounds, bounds, longest, longest, scale=scaling, **options)
    assert isinstance(result, Tensor)
    return result[None], None


def _attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    """The same without the kernel, sequence by sequence: for tests on a CPU."""
    outputs = []
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (rows[start:end].transpose(0, 1) for rows in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None, :]
        mask = (distance >= 0) & (distance < (window or end - start + 1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(attended.transpose(0, 1))
    return torch.cat(outputs)
