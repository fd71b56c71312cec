"""The output head reads only what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def head_reads(model: Any, wanted: Tensor | None = None) -> Iterator[None]:
    """For the block, the head sees contiguous rows: all of them, or those where `wanted` ([B, T] bool) says so.

    With `wanted` logits become [N, V]. A sliced, non-contiguous input would make PyTorch multiply batch by batch with a
    copy of the whole head for each: half the time of a small model's step on a CPU.
    """

    def read(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].contiguous() if wanted is None else inputs[0][wanted],)

    head = model.get_output_embeddings()
    if head is None:  # a bare decoder has nothing to spare
        yield
        return
    handle = head.register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()
