"""Ranks of very many scores."""

from __future__ import annotations

import torch
from torch import Tensor


def best_first(scores: Tensor) -> Tensor:
    """float32 [n] -> long [n]: where the highest score is, then the next; equal ones by index, NaN before all.

    As `argsort(descending=True, stable=True)` in a tenth of the time: torch sorts integers by radix, and the bits of a
    float are in order once those of negative ones are turned round.
    """
    one_zero = (scores + 0.0).nan_to_num(torch.nan, torch.inf, -torch.inf)  # there are two, and NaN of either sign
    bits = one_zero.view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (~ascending).argsort(stable=True)
