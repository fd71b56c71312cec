"""Which sequences share a forward pass, and how they are padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

MAX_LOGITS_PER_PASS = 2**27  # most logits of one pass: half a GiB in float32
EFFICIENT_PASS_TOKENS = 1024  # tokens from which on a larger pass is hardly faster, so that padding is what costs
MAX_LENGTH_RATIO = 1.2
T = TypeVar("T")
OnItemsDone = Callable[[int], None]  # told how many items more are done


def batch_by_length(
    things: Sequence[T],
    length: Callable[[T], int],
    fits: Callable[[int, int], bool],
    *,
    max_length_ratio: float = math.inf,
) -> Iterator[list[T]]:
    """Runs of similar length, each with `fits(rows, longest)`, or one thing alone that fits nowhere.

    A run of `ENOUGH` tokens takes in nothing that is more than `spread` times as long as its shortest.
    """
    group: list[T] = []
    for thing in sorted(things, key=length):
        longest = length(thing)
        if group and (
            not fits(len(group) + 1, longest)
            or (len(group) * longest >= EFFICIENT_PASS_TOKENS and longest > max_length_ratio * length(group[0]))
        ):
            yield group
            group = []
        group.append(thing)
    if group:
        yield group


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences side by side; all [rows, longest]."""

    input_ids: Tensor
    attention_mask: Tensor  # 1 where a token stands
    position_ids: Tensor  # 0 at each sequence's first token


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> PaddedBatch:
    """Sequences that end together, so that the last column is everyone's next token."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.tensor([[pad_id] * (width - len(sequence)) + list(sequence) for sequence in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences], device=device)
    return PaddedBatch(ids, mask, position_ids_from_mask(mask))


def position_ids_from_mask(mask: Tensor) -> Tensor:
    """[rows, length] of 0 and 1 -> the place of each token among its row's tokens."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
