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

from prunetune.data.batches import IGNORED
from prunetune.data.templates import Example

TOKENS = 1024  # N is a multiple of this, and of this times a power of two once rows are long
LABELS = 1024  # M in steps as N
LONGEST = 2048  # what attention is told of the longest sequence is this times a power of four


@dataclass(frozen=True)
class Pack:
    """One row of whole sequences. The rest of the row is a sequence of padding that nothing else reads."""

    input_ids: Tensor  # long [1, N]
    position_ids: Tensor  # long [1, N], 0 at each sequence's first token
    bounds: Tensor  # int32 [S + 2]: sequence s stands at bounds[s] : bounds[s + 1]; empty ones at the end
    length: Tensor  # long scalar, tokens before the padding
    predicting: Tensor  # long [M], where in the row logits are needed
    targets: Tensor  # long [M], what they predict; -100 where M was rounded up
    tokens: int = field(kw_only=True)  # targets that count
    longest: int = field(kw_only=True)  # no sequence of the row, padding included, is longer

    @property
    def shape(self) -> tuple[int, ...]:
        """All that a graph of kernels depends on."""
        return (self.input_ids.numel(), self.bounds.numel(), self.predicting.numel(), self.longest)

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [self.input_ids, self.position_ids, self.bounds, self.length, self.predicting, self.targets]

    def holding(self, tensors: Sequence[Tensor]) -> Pack:
        """The same with other tensors, in the order of `tensors()`."""
        names = ("input_ids", "position_ids", "bounds", "length", "predicting", "targets")
        return replace(self, **dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]


def pack(examples: Sequence[Example], pad_id: int, *, sequences: int) -> Pack:
    """All `examples`, at most `sequences` of them, in one row."""
    lengths = [len(example.ids) for example in examples]
    bounds = [0, *accumulate(lengths)]
    labels = [
        torch.arange(start + example.answer_from, end)
        for example, (start, end) in zip(examples, pairwise(bounds), strict=True)
    ]
    ids, labelled = _row(chain.from_iterable(example.ids for example in examples)), torch.cat(labels)
    width, tokens = stepped(len(ids), TOKENS), len(labelled)
    spare, idle = width - len(ids), stepped(max(1, tokens), LABELS) - tokens
    return Pack(
        input_ids=F.pad(ids, (0, spare), value=pad_id)[None],
        position_ids=F.pad(torch.cat([torch.arange(length) for length in lengths]), (0, spare))[None],
        bounds=torch.tensor(bounds + [width] * (sequences + 2 - len(bounds)), dtype=torch.int32),
        length=torch.tensor(len(ids)),
        predicting=F.pad(labelled - 1, (0, idle)),
        targets=F.pad(ids[labelled], (0, idle), value=IGNORED),
        tokens=tokens,
        longest=_grown(max(spare, *lengths), LONGEST),
    )


def _row(ids: Iterable[int]) -> Tensor:
    """Long [N]; several times as fast as from a list, while a GPU waits."""
    return torch.from_numpy(np.fromiter(ids, np.int64))


def _grown(length: int, least: int) -> int:
    """The first of `least`, four times `least`, sixteen times ... that is not below `length`."""
    return least if length <= least else _grown(length, 4 * least)


def stepped(length: int, step: int) -> int:
    """`length` rounded up to a multiple of `step`, which grows with it: at most an eighth is wasted, or one step."""
    while length > 16 * step:
        step *= 2
    return -(-length // step) * step


def packable(examples: Sequence[Example], max_tokens: int) -> list[list[Example]]:
    """Every example once, in order, in lists of at most `max_tokens`; one longer stands alone."""
    lists: list[list[Example]] = []
    room = 0
    for example in examples:
        if len(example.ids) > room or not lists:
            lists.append([])
            room = max_tokens
        lists[-1].append(example)
        room -= len(example.ids)
    return lists
