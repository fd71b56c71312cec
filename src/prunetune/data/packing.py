"""Examples end to end in one row, so that no arithmetic goes to padding; shapes in steps, so that few of them occur.

Each shape is recorded once for each kind of pass, half a second of a small model's time; steps are as wide as that pays
for (`benchmarks/shapes.py`): labels and the longest sequence cost little where they are rounded up, tokens their share.

Shapes: N tokens of a row, S sequences in it, M places where the loss counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.data.batches import IGNORE_INDEX
from prunetune.data.encoding import Example

TOKEN_STEP = 1024  # N is a multiple of this, and of this times a power of two once rows are long
LABEL_STEP = 1024  # M in steps as N
LONGEST_STEP = 2048  # what attention is told of the longest sequence is this times a power of four


@dataclass(frozen=True)
class PackedBatch:
    """One row of whole sequences. The rest of the row is a sequence of padding that nothing else reads."""

    input_ids: Tensor  # long [1, N]
    position_ids: Tensor  # long [1, N], 0 at each sequence's first token
    cu_seq_lens: Tensor  # int32 [S + 2]: sequence s stands at bounds[s] : bounds[s + 1]; empty ones at the end
    unpadded_length: Tensor  # long scalar, tokens before the padding
    prediction_positions: Tensor  # long [M], where in the row logits are needed
    targets: Tensor  # long [M], what they predict; -100 where M was rounded up
    target_tokens: int = field(kw_only=True)  # targets that count
    max_seq_len: int = field(kw_only=True)  # no sequence of the row, padding included, is longer

    @property
    def shape_key(self) -> tuple[int, ...]:
        """All that a graph of kernels depends on."""
        return (self.input_ids.numel(), self.cu_seq_lens.numel(), self.prediction_positions.numel(), self.max_seq_len)

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [
            self.input_ids,
            self.position_ids,
            self.cu_seq_lens,
            self.unpadded_length,
            self.prediction_positions,
            self.targets,
        ]

    def with_tensors(self, tensors: Sequence[Tensor]) -> PackedBatch:
        """The same with other tensors, in the order of `tensors()`."""
        names = ("input_ids", "position_ids", "cu_seq_lens", "unpadded_length", "prediction_positions", "targets")
        return replace(self, **dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]


def pack_examples(examples: Sequence[Example], pad_id: int, *, max_sequences: int) -> PackedBatch:
    """All `examples`, at most `sequences` of them, in one row."""
    lengths = [len(example.token_ids) for example in examples]
    bounds = [0, *accumulate(lengths)]
    labels = [
        torch.arange(start + example.answer_start, end)
        for example, (start, end) in zip(examples, pairwise(bounds), strict=True)
    ]
    ids, labelled = _row(chain.from_iterable(example.token_ids for example in examples)), torch.cat(labels)
    width, tokens = round_up_length(len(ids), TOKEN_STEP), len(labelled)
    spare, idle = width - len(ids), round_up_length(max(1, tokens), LABEL_STEP) - tokens
    return PackedBatch(
        input_ids=F.pad(ids, (0, spare), value=pad_id)[None],
        position_ids=F.pad(torch.cat([torch.arange(length) for length in lengths]), (0, spare))[None],
        cu_seq_lens=torch.tensor(bounds + [width] * (max_sequences + 2 - len(bounds)), dtype=torch.int32),
        unpadded_length=torch.tensor(len(ids)),
        prediction_positions=F.pad(labelled - 1, (0, idle)),
        targets=F.pad(ids[labelled], (0, idle), value=IGNORE_INDEX),
        target_tokens=tokens,
        max_seq_len=_round_up_by_fours(max(spare, *lengths), LONGEST_STEP),
    )


def _row(ids: Iterable[int]) -> Tensor:
    """Long [N]; several times as fast as from a list, while a GPU waits."""
    return torch.from_numpy(np.fromiter(ids, np.int64))


def _round_up_by_fours(length: int, least: int) -> int:
    """The first of `least`, four times `least`, sixteen times ... that is not below `length`."""
    return least if length <= least else _round_up_by_fours(length, 4 * least)


def round_up_length(length: int, step: int) -> int:
    """`length` rounded up to a multiple of `step`, which grows with it: at most an eighth is wasted, or one step."""
    while length > 16 * step:
        step *= 2
    return -(-length // step) * step


def group_for_packing(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Every example once, in order, in lists of at most `max_tokens`; one longer stands alone."""
    lists: list[list[Example]] = []
    room = 0
    for example in examples:
        if len(example.token_ids) > room or not lists:
            lists.append([])
            room = max_tokens
        lists[-1].append(example)
        room -= len(example.token_ids)
    return lists
