"""The output head reads only what is asked of it, and a loss goes through it in portions.

Shapes: N places of a pass, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**26  # most logits at a time: a quarter of a GiB in float32


@contextmanager
def select_head_inputs(model: Any, positions: Tensor | None = None) -> Iterator[None]:
    """For the block, the head sees contiguous rows: all of them, or those that `wanted` names.

    `wanted` is a mask (bool [B, T]) or places in the flattened batch (long [N]); with it logits become [N, V]. A
    sliced, non-contiguous input would make PyTorch multiply batch by batch with a copy of the whole head for each: half
    the time of a small model's step on a CPU.
    """

    def read(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = inputs[0]
        if positions is None:
            return (hidden.contiguous(),)
        return (
            hidden[positions] if positions.dtype == torch.bool else hidden.flatten(0, 1).index_select(0, positions),
        )

    head = model.get_output_embeddings()
    if head is None:  # a bare decoder has nothing to spare
        yield
        return
    handle = head.register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture_head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """For the block, the head computes nothing; the list gets what it would have read, flattened: [N, H] a pass."""
    seen: list[Tensor] = []

    def catch(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(inputs[0].flatten(0, 1))
        return (seen[-1][:0],)

    handle = model.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        yield seen
    finally:
        handle.remove()


def logits_function(model: Any) -> Callable[[Tensor], Tensor]:
    """From what the head reads to logits, [n, H] -> [n, V]: the head itself and what the family does to its output."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1) / float(getattr(text, "logits_scaling", None) or 1)
    cap = getattr(text, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        result: Tensor = head(hidden)
        result = result if scale == 1 else result * scale
        return result if cap is None else torch.tanh(result / cap) * cap

    return logits


def chunked_loss(hidden: Tensor, vocab_size: int, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The sum of `loss(hidden[places], places)` over portions of the N places, with its gradient at `hidden`: a scalar.

    Logits of a whole pass are the largest tensors there are. The head is frozen, so a portion's gradient is taken at
    once, and its logits are dropped (fused linear cross-entropy: Hsu et al. 2024, Liger Kernel, arXiv 2410.10989).
    """
    result: Tensor = _ChunkedLoss.apply(hidden, max(1, LOGITS_PER_CHUNK // vocab_size), loss)  # type: ignore[no-untyped-call]
    return result


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), size):
            places = slice(start, start + size)
            with torch.set_grad_enabled(gradient is not None):
                portion = hidden[places].detach().requires_grad_(gradient is not None)
                value = loss(portion, places)
            if gradient is not None:
                (gradient[places],) = torch.autograd.grad(value, portion)
            total += value.detach()
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None
