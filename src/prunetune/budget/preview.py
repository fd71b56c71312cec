"""What a budget would mean, by count, before anything is trained: sizes, and the most that time can gain."""

from __future__ import annotations

from dataclasses import dataclass

SHOWN = (0.7, 0.6, 0.5)  # shares that may remain
STORED = 2  # bytes of a weight in 16 bits


@dataclass(frozen=True)
class Holdings:
    """Parameters of a dense model by what reads them."""

    everything: int
    prunable: int
    table: int  # the input embedding, where it is not the head: looked up, never multiplied
    head: int  # the output matrix, tied or not: read in every step, for one token of a prompt


@dataclass(frozen=True)
class Preview:
    """A model that keeps a share of its prunable parameters; prefill and decode: times faster, at best."""

    keep: float
    parameters: int
    weight_bytes: int
    prefill: float  # matrices' FLOPs per token of a prompt, attention between tokens left out
    decode: float  # bytes of weights that a step of one short sequence reads


def preview(dense: Holdings, keep: float) -> Preview:
    """Of the budget met to the last parameter; a real plan keeps up to one block less."""
    gone = round((1 - keep) * dense.prunable)
    read = dense.everything - dense.table
    blocks = read - dense.head
    left = dense.everything - gone
    return Preview(keep, left, STORED * left, blocks / (blocks - gone), read / (read - gone))
