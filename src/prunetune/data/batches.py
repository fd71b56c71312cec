"""Batches: examples padded side by side or packed end to end, and the seeded stream that training draws them from.

Shapes: B examples of a batch, T tokens of the longest one.
"""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.data.encoding import Example
from prunetune.errors import DataError

IGNORE_INDEX = -100  # the label that cross-entropy ignores
SMALL_BATCH_TOKENS = 1024  # padding is free up to here: smaller passes take the time of their launches


@dataclass(frozen=True)
class Batch:
    """Examples as rows, padded on the right. labels[b, t] is input_ids[b, t] where the loss counts, else -100.

    Under a causal mask no token attends to the padding after it, so no attention mask is needed: attention takes its
    fastest kernel, and no row is fully masked (for which some kernels return NaN).
    """

    input_ids: Tensor  # long [B, T]
    labels: Tensor  # long [B, T]; logits at t - 1 predict them
    target_tokens: int  # labels other than -100
    lengths: tuple[int, ...]  # tokens of each row without padding
    example_ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> Self:
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device))

    @property
    def token_mask(self) -> Tensor:
        """True at tokens, False at padding: bool [B, T]."""
        lengths = torch.tensor(self.lengths, device=self.input_ids.device)
        return torch.arange(self.input_ids.shape[1], device=lengths.device)[None] < lengths[:, None]

    @property
    def prediction_mask(self) -> Tensor:
        """True where logits are needed, one position before each label: bool [B, T]."""
        return F.pad(self.labels[:, 1:] != IGNORE_INDEX, (0, 1))

    @property
    def targets(self) -> Tensor:
        """The labels other than -100, in the order of `prediction_mask`: long [`target_tokens`]."""
        return self.labels[self.labels != IGNORE_INDEX]


def pad_token_id(tokenizer: Any) -> int:
    """The token that rows are padded with; which one it is has no effect."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch of all examples; there must be one at least."""
    longest = max(len(example.token_ids) for example in examples)
    ids, labels = [], []
    for example in examples:
        padding = longest - len(example.token_ids)
        ids.append([*example.token_ids, *[pad_id] * padding])
        row = [IGNORE_INDEX] * longest
        for start, end in example.loss_spans:
            row[start:end] = example.token_ids[start:end]
        labels.append(row)
    return Batch(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        target_tokens=sum(example.loss_tokens for example in examples),
        lengths=tuple(len(example.token_ids) for example in examples),
        example_ids=tuple(example.id for example in examples),
    )


def micro_batches(
    examples: Sequence[Example], max_tokens: int, small_batch_tokens: int = SMALL_BATCH_TOKENS
) -> list[list[Example]]:
    """Every example once, longest first, in lists of at most `max_tokens` tokens with padding; a longer one is alone.

    An example of less than half the length of a list's longest starts a new list, unless the padded list has no more
    than `small_batch_tokens`.
    """
    batches: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example.token_ids)):
        if batches:
            longest = len(batches[-1][0].token_ids)
            padded = longest * (len(batches[-1]) + 1)
            if padded <= max_tokens and (padded <= small_batch_tokens or 2 * len(example.token_ids) >= longest):
                batches[-1].append(example)
                continue
        batches.append([example])
    return batches


def unlabelled_examples(texts: Sequence[Example], labelled: Sequence[Example], share: float) -> tuple[Example, ...]:
    """The texts without labels, weighted so that they are this share of a stream of both; none without labelled ones.

    Raises `DataError` if there is no text.
    """
    if not texts:
        raise DataError("no text of data.distill_texts fits data.max_length; raise it or set data.too_long=truncate")
    if not labelled:
        return ()
    total = sum(example.weight for example in texts)
    scale = share / (1 - share) * sum(example.weight for example in labelled) / total
    return tuple(replace(text, answer_start=len(text.token_ids), weight=text.weight * scale) for text in texts)


class BatchStream:
    """Endless batches, each a pure function of (seed, step), so that a resumed run has nothing to restore.

    Epochs are seeded permutations, one after the other, cut into batches of exactly `batch_size`. An example of weight
    w appears floor(w) times in every epoch, and once more in a share w - floor(w) of the epochs. Raises `DataError` if
    there is no example.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        if not examples:
            raise DataError("no example to train on: none fits data.max_length; raise it or set data.too_long=truncate")
        if batch_size < 1:
            raise ValueError(f"batch size must be 1 or more, got {batch_size}")
        self.examples, self.batch_size, self.seed = tuple(examples), batch_size, seed
        weights = torch.tensor([example.weight for example in self.examples], dtype=torch.float64)
        self._whole, self._fractions = weights.floor().long(), weights - weights.floor()
        # Where each example starts in its cycle of extra appearances, in [0, 1).
        self._phase = torch.rand(len(self.examples), generator=self._generator("phase"), dtype=torch.float64)

    def batch_at(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        high = 1  # the last epoch that starts at or before the position, by bisection, since epochs differ in length
        while self._appearances_before(high) <= position:
            high *= 2
        epoch = bisect.bisect_right(range(high), position, lo=high // 2, key=self._appearances_before) - 1
        chosen: list[Example] = []
        while position < end:
            order, start = self._epoch_order(epoch), self._appearances_before(epoch)
            indices = order[position - start : end - start]
            chosen += [self.examples[index] for index in indices]
            position += len(indices)
            epoch += 1
        return chosen

    def _appearances_before(self, epoch: int) -> int:
        """Length of all epochs before this one."""
        return int(self._appearances(epoch).sum())

    def _appearances(self, epoch: int) -> Tensor:
        """How often each example appeared before an epoch: long [examples]."""
        return self._whole * epoch + (self._fractions * epoch + self._phase).floor().long()

    def _epoch_order(self, epoch: int) -> list[int]:
        """Indices of examples in the order of an epoch."""
        counts = self._appearances(epoch + 1) - self._appearances(epoch)
        indices = torch.arange(len(self.examples)).repeat_interleave(counts)
        order: list[int] = indices[torch.randperm(len(indices), generator=self._generator(f"epoch {epoch}"))].tolist()
        return order

    def _generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# -- packing: N tokens of a row, S sequences at most, M positions where logits are computed ----------------------------

# For each shape and each kind of pass, CUDA graphs are recorded once, which takes half a second for a small model. The
# steps balance that against padding (`benchmarks/shapes.py`): labels and the longest sequence cost little when they are
# rounded up, tokens cost their share.
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

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same with other tensors, in the order of `tensors()`."""
        return replace(self, **dict(zip(TENSOR_FIELDS, tensors, strict=True)))  # type: ignore[arg-type]


def pack_examples(
    examples: Sequence[Example], pad_id: int, *, max_sequences: int, step_factor: float = 1
) -> PackedBatch:
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
    row_length = round_up_length(len(ids), int(step_factor * TOKEN_STEP))
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
