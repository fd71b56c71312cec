"""Batches: examples as padded tensors, and the seeded stream of examples that training draws them from.

Shapes: B examples of a batch, T tokens of the longest one.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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

    def to(self, device: torch.device | str) -> Batch:
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
        epoch = self._epoch_at(position)
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

    def _epoch_at(self, position: int) -> int:
        """The last epoch that starts at or before a position, by bisection, since epochs differ in length."""
        high = 1
        while self._appearances_before(high) <= position:
            high *= 2
        return bisect.bisect_right(range(high), position, lo=high // 2, key=self._appearances_before) - 1

    def _generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
