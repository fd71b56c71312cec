"""Examples end to end in one row, so that no arithmetic goes to padding; shapes in steps, so that few of them occur.

Shapes: N tokens of a row, S sequences in it, M places where the loss counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prunetune.data.batches import IGNORED
from prunetune.data.templates import Example

TOKENS = 1024  # N is a multiple of this, and of this times a power of two once rows are long
LABELS = 512  # M is a multiple of this
LONGEST = 512  # what attention is told of the longest sequence is this times a power of four


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
        sizes = (self.input_ids.numel(), self.bounds.numel(), self.predicting.numel())
        return (*sizes, self.longest, int(self.tokens > 0))

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [self.input_ids, self.position_ids, self.bounds, self.length, self.predicting, self.targets]

    def holding(self, tensors: Sequence[Tensor]) -> Pack:
        """The same with other tensors, in the order of `tensors()`."""
        names = ("input_ids", "position_ids", "bounds", "length", "predicting", "targets")
        return replace(self, **dict(zip(names, tensors, strict=True)))  # type: ignore[arg-type]


def pack(examples: Sequence[Example], pad_id: int, *, sequences: int) -> Pack:
    """All `examples`, at most `sequences` of them, in one row."""
    ids: list[int] = []
    positions: list[int] = []
    bounds = [0]
    predicting: list[int] = []
    targets: list[int] = []
    for example in examples:
        start = len(ids)
        ids += example.ids
        positions += range(len(example.ids))
        bounds.append(len(ids))
        predicting += range(start + example.answer_from - 1, start + len(example.ids) - 1)
        targets += example.ids[example.answer_from :]
    width, tokens = stepped(len(ids), TOKENS), len(targets)
    spare, idle = width - len(ids), -(-max(1, tokens) // LABELS) * LABELS - tokens
    return Pack(
        input_ids=torch.tensor([ids + [pad_id] * spare]),
        position_ids=torch.tensor([positions + [0] * spare]),
        bounds=torch.tensor(bounds + [width] * (sequences + 2 - len(bounds)), dtype=torch.int32),
        length=torch.tensor(len(ids)),
        predicting=torch.tensor(predicting + [0] * idle),
        targets=torch.tensor(targets + [IGNORED] * idle),
        tokens=tokens,
        longest=_grown(max(spare, *(len(example.ids) for example in examples)), LONGEST),
    )


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
