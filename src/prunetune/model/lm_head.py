"""The output head on selected positions only, and losses through it in chunks.

Shapes: B sequences of T tokens, N positions of a pass, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LOGITS_PER_CHUNK = 2**26  # at most: a quarter of a GiB in float32


@contextmanager
def select_head_inputs(model: Any, positions: Tensor | None = None) -> Iterator[None]:
    """For the block, the head reads contiguous rows: all of them, or those at `positions`.

    Positions are a mask (bool [B, T]) or indices into the flattened batch (long [N]); with them logits are [N, V]. For
    a non-contiguous input PyTorch would multiply sequence by sequence with a copy of the whole head for each, which is
    half the time of a small model's step on a CPU. A decoder without a head is left as it is.
    """

    def select(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = inputs[0]
        if positions is None:
            return (hidden.contiguous(),)
        if positions.dtype == torch.bool:
            return (hidden[positions],)
        return (hidden.flatten(0, 1).index_select(0, positions),)

    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture_head_inputs(model: Any) -> Iterator[list[Tensor]]:
    """For the block, the head computes nothing; each pass appends its flattened input, [N, H], to the list."""
    captured: list[Tensor] = []

    def capture(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        captured.append(inputs[0].flatten(0, 1))
        return (captured[-1][:0],)

    handle = model.get_output_embeddings().register_forward_pre_hook(capture)
    try:
        yield captured
    finally:
        handle.remove()


def logits_function(model: Any) -> Callable[[Tensor], Tensor]:
    """The function from the head's input to logits, [n, H] -> [n, V], with the family's scale and soft cap."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        result: Tensor = head(hidden)
        result = result if scale == 1 else result * scale
        return result if cap is None else torch.tanh(result / cap) * cap

    return logits


def chunked_loss(hidden: Tensor, vocab_size: int, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The sum of `loss(hidden[chunk], chunk)` over chunks of the N positions, as a scalar with a gradient to [N, H].

    Logits of a whole pass would be its largest tensors. As the head is frozen, a chunk's gradient is taken at once and
    its logits are freed (fused linear cross-entropy: Hsu et al. 2024, Liger Kernel, arXiv 2410.10989).
    """
    result: Tensor = _ChunkedLoss.apply(hidden, max(1, LOGITS_PER_CHUNK // vocab_size), loss)  # type: ignore[no-untyped-call]
    return result


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int, loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(gradient is not None):
                chunk_hidden = hidden[chunk].detach().requires_grad_(gradient is not None)
                value = loss(chunk_hidden, chunk)
            if gradient is not None:
                (gradient[chunk],) = torch.autograd.grad(value, chunk_hidden)
            total += value.detach()
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None
