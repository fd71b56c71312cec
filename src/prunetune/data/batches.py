"""Examples as padded tensors, and the order in which training sees them.

Shapes: B examples of a batch, T tokens of the longest one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunetune.data.encoding import Example
from prunetune.errors import DataError

IGNORE_INDEX = -100  # the label that cross-entropy passes over


# Padding is free up to here: smaller passes cost their launches, not their tokens.
SMALL_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right. labels[b, t] is input_ids[b, t] where loss counts, else -100.

    Under a causal mask nothing real ever reads padding that stands behind it, so no attention mask is needed: attention
    takes its fastest path, and no row is wholly masked (which some kernels answer with NaN).
    """

    input_ids: Tensor  # long [B, T]
    labels: Tensor  # long [B, T]; logits at t - 1 predict them
    target_tokens: int  # labels that count
    lengths: tuple[int, ...]  # of each row without its padding
    example_ids: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return replace(self, input_ids=self.input_ids.to(device), labels=self.labels.to(device))

    @property
    def token_mask(self) -> Tensor:
        """Where there is a token and no padding: bool [B, T]."""
        lengths = torch.tensor(self.lengths, device=self.input_ids.device)
        return torch.arange(self.input_ids.shape[1], device=lengths.device)[None] < lengths[:, None]

    @property
    def prediction_mask(self) -> Tensor:
        """Where logits are needed: bool [B, T], one position before each label."""
        return F.pad(self.labels[:, 1:] != IGNORE_INDEX, (0, 1))

    @property
    def targets(self) -> Tensor:
        """The labels that count, in the order of `predicting`: long [N]."""
        return self.labels[self.labels != IGNORE_INDEX]


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills up rows; which one it is has no effect."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in known if token is not None))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One batch of all `examples`, which must not be empty."""
    longest = max(len(example.token_ids) for example in examples)
    ids, labels = [], []
    for example in examples:
        padding = longest - len(example.token_ids)
        answer = example.token_ids[example.answer_start :]
        ids.append([*example.token_ids, *[pad_id] * padding])
        labels.append([*[IGNORE_INDEX] * example.answer_start, *answer, *[IGNORE_INDEX] * padding])
    return Batch(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        target_tokens=sum(len(example.token_ids) - example.answer_start for example in examples),
        lengths=tuple(len(example.token_ids) for example in examples),
        example_ids=tuple(example.id for example in examples),
    )


def micro_batches(
    examples: Sequence[Example], max_tokens: int, small_batch_tokens: int = SMALL_BATCH_TOKENS
) -> list[list[Example]]:
    """Every example once, longest first, in lists of at most `max_tokens` with padding; one longer stands alone.

    Examples of less than half the length of a list's longest start a new list, unless the list holds `small` or less.
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
    """The texts without labels, weighing such that they are `share` of a stream that holds `beside` too.

    Raises `DataError` where there is no text; where nothing stands beside them, texts alone are no stream: none.
    """
    if not texts:
        raise DataError("no text of data.distill_texts fits data.max_length; raise it or set data.too_long=truncate")
    if not labelled:
        return ()
    total = sum(example.weight for example in texts)
    scale = share / (1 - share) * sum(example.weight for example in labelled) / total
    return tuple(replace(text, answer_start=len(text.token_ids), weight=text.weight * scale) for text in texts)


class BatchStream:
    """Endless batches, each a pure function of (seed, step): nothing to save for a resumed run.

    Epochs are seeded permutations, laid end to end and cut into batches of exactly `batch_size`. An example of weight w
    appears floor(w) times an epoch, and once more in a share w - floor(w) of the epochs. Raises `DataError` without
    examples.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        if not examples:
            raise DataError("no example to train on: none fits data.max_length; raise it or set data.too_long=truncate")
        if batch_size < 1:
            raise ValueError(f"batch size must be 1 or more, got {batch_size}")
        self.examples = tuple(examples)
        self.batch_size = batch_size
        self.seed = seed
        weights = torch.tensor([example.weight for example in self.examples], dtype=torch.float64)
        self._whole = weights.floor().long()
        self._fractions = weights - weights.floor()
        # Where in its cycle of extra appearances an example starts.
        self._phase = torch.rand(len(self.examples), generator=self._generator("phase"), dtype=torch.float64)

    def batch_at(self, step: int) -> list[Example]:
        """The examples of a step, counted from 0."""
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        epoch = self._epoch_at(position)
        chosen: list[Example] = []
        while position < end:
            order, start = self._order(epoch), self._before(epoch)
            taken = order[position - start : end - start]
            chosen += [self.examples[index] for index in taken]
            position += len(taken)
            epoch += 1
        return chosen

    def _before(self, epoch: int) -> int:
        """Appearances in all epochs before this one."""
        return int(self._appearances(epoch).sum())

    def _appearances(self, epoch: int) -> Tensor:
        return self._whole * epoch + (self._fractions * epoch + self._phase).floor().long()

    def _order(self, epoch: int) -> list[int]:
        counts = self._appearances(epoch + 1) - self._appearances(epoch)
        indices = torch.arange(len(self.examples)).repeat_interleave(counts)
        order: list[int] = indices[torch.randperm(len(indices), generator=self._generator(f"epoch {epoch}"))].tolist()
        return order

    def _epoch_at(self, position: int) -> int:
        """The last epoch that starts at or before a position: bisection, since epochs differ in size."""
        low, high = 0, 1
        while self._before(high) <= position:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= position else (low, middle)
        return low

    def _generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
