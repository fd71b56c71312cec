"""Sequence packing: examples one after the other in a single row, whose length is rounded so that few shapes occur.

For each shape and each kind of pass, CUDA graphs are recorded once, which takes half a second for a small model. The
steps below balance that against padding (`benchmarks/shapes.py`): labels and the longest sequence cost little when they
are rounded up, tokens cost their share.

Shapes: N tokens of a row, S sequences at most, M positions where logits are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.data.batches import IGNORE_INDEX
from prunetune.data.encoding import Example

TOKEN_STEP = 1024  # N is a multiple of this, and of this times a power of two once rows are long
LABEL_STEP = 1024  # M in steps as N
LONGEST_STEP = 2048  # attention gets the longest length rounded up to this times a power of four
TENSOR_FIELDS = ("input_ids", "position_ids", "cu_seq_lens", "unpadded_length", "prediction_positions", "targets")


@dataclass(frozen=True)
class PackedBatch:
    """One row of whole sequences, and a last one of padding. No sequence attends to another."""

    input_ids: Tensor  # long [1, N]
    position_ids: Tensor  # long [1, N], 0 at each sequence's first token
    cu_seq_lens: Tensor  # int32 [S + 2]: sequence s is at cu_seq_lens[s] : cu_seq_lens[s + 1]; empty ones come last
    unpadded_length: Tensor  # long scalar, tokens before the padding
    prediction_positions: Tensor  # long [M]: where in the row logits are needed
    targets: Tensor  # long [M]: the tokens they predict; -100 where M was rounded up
    target_tokens: int = field(kw_only=True)  # targets other than -100
    max_seq_len: int = field(kw_only=True)  # at least the longest sequence, padding included

    @property
    def shape_key(self) -> tuple[int, ...]:
        """The sizes that a CUDA graph depends on."""
        return (self.input_ids.numel(), self.cu_seq_lens.numel(), self.prediction_positions.numel(), self.max_seq_len)

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [getattr(self, name) for name in TENSOR_FIELDS]

    def with_tensors(self, tensors: Sequence[Tensor]) -> PackedBatch:
        """The same with other tensors, in the order of `tensors()`."""
        return replace(self, **dict(zip(TENSOR_FIELDS, tensors, strict=True)))  # type: ignore[arg-type]


def pack_examples(examples: Sequence[Example], pad_id: int, *, max_sequences: int, step_factor: int = 1) -> PackedBatch:
    """All examples, `max_sequences` at most, in one row of a multiple of `step_factor` times TOKEN_STEP tokens."""
    lengths = [len(example.token_ids) for example in examples]
    bounds = [0, *accumulate(lengths)]
    spans = [
        torch.arange(first + start, first + end)
        for first, example in zip(bounds, examples, strict=False)
        for start, end in example.loss_spans
    ]
    labelled = torch.cat([torch.arange(0), *spans])
    # By NumPy several times as fast as from a list, while a GPU waits.
    ids = torch.from_numpy(np.fromiter(chain.from_iterable(example.token_ids for example in examples), np.int64))
    row_length = round_up_length(len(ids), step_factor * TOKEN_STEP)
    padding = row_length - len(ids)
    label_padding = round_up_length(max(1, len(labelled)), LABEL_STEP) - len(labelled)
    max_seq_len = LONGEST_STEP
    while max_seq_len < max(padding, *lengths):
        max_seq_len *= 4
    return PackedBatch(
        input_ids=F.pad(ids, (0, padding), value=pad_id)[None],
        position_ids=F.pad(torch.cat([torch.arange(length) for length in lengths]), (0, padding))[None],
        cu_seq_lens=torch.tensor(bounds + [row_length] * (max_sequences + 2 - len(bounds)), dtype=torch.int32),
        unpadded_length=torch.tensor(len(ids)),
        prediction_positions=F.pad(labelled - 1, (0, label_padding)),
        targets=F.pad(ids[labelled], (0, label_padding), value=IGNORE_INDEX),
        target_tokens=len(labelled),
        max_seq_len=max_seq_len,
    )


def round_up_length(length: int, step: int) -> int:
    """A length rounded up to a multiple of a step that doubles with it: at most an eighth is padding, or one step."""
    while length > 16 * step:
        step *= 2
    return -(-length // step) * step


def group_for_packing(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Every example once, in order, in lists of at most `max_tokens` tokens; a longer one is alone."""
    groups: list[list[Example]] = []
    tokens_left = 0
    for example in examples:
        if len(example.token_ids) > tokens_left or not groups:
            groups.append([])
            tokens_left = max_tokens
        groups[-1].append(example)
        tokens_left -= len(example.token_ids)
    return groups
