"""The output head reads only what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def head_reads(model: Any, wanted: Tensor | None = None) -> Iterator[None]:
    """For the block, the head sees contiguous rows: all of them, or those that `wanted` names.

    `wanted` is a mask (bool [B, T]) or places in the flattened batch (long [N]); with it logits become [N, V]. A
    sliced, non-contiguous input would make PyTorch multiply batch by batch with a copy of the whole head for each: half
    the time of a small model's step on a CPU.
    """

    def read(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = inputs[0]
        if wanted is None:
            return (hidden.contiguous(),)
        return (hidden[wanted] if wanted.dtype == torch.bool else hidden.flatten(0, 1).index_select(0, wanted),)

    head = model.get_output_embeddings()
    if head is None:  # a bare decoder has nothing to spare
        yield
        return
    handle = head.register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()
