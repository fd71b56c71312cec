"""Answers of the dense and the pruned model to the same question, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prunetune.evaluation.results import Evaluation, Item
from prunetune.report import text
from prunetune.report.scores import reference_of

Flip = Literal["lost", "gained", "right", "wrong", "open"]

WANTED: dict[Flip, int] = {"lost": 4, "gained": 3, "open": 3, "right": 1, "wrong": 1}
LONGEST = 4_000  # characters of any one text


@dataclass(frozen=True)
class Mark:
    """What an answer was found to be."""

    right: bool | None  # None for a generated text, which has no right and wrong
    words: str


@dataclass(frozen=True)
class Sample:
    """One test item with both answers."""

    task: str
    flip: Flip
    prompt: str
    expected: str
    reference: str
    pruned: str
    reference_mark: Mark
    pruned_mark: Mark


@dataclass(frozen=True)
class Samples:
    """The chosen samples, and how all paired items changed."""

    reference: str  # "tuned" or "dense", "" where there is none
    shown: tuple[Sample, ...]
    counts: Mapping[Flip, int]


def choose(evaluations: Mapping[str, Evaluation]) -> Samples:
    """About a dozen items that both models answered: flips first, spread over the tasks."""
    reference = reference_of(evaluations)
    if "pruned" not in evaluations or not reference:
        return Samples(reference, (), {})
    pairs = _pairs(evaluations[reference], evaluations["pruned"])
    counts: dict[Flip, int] = {flip: sum(sample.flip == flip for sample in pairs) for flip in WANTED}
    return Samples(reference, tuple(_spread(pairs)), counts)


def _pairs(reference: Evaluation, pruned: Evaluation) -> list[Sample]:
    pairs = []
    for task, result in pruned.tasks.items():
        before = {item.id: item for item in reference.tasks[task].items} if task in reference.tasks else {}
        pairs += [
            _sample(task, before[item.id], item) for item in result.items if item.id in before and _answered(item)
        ]
    return pairs


def _sample(task: str, reference: Item, pruned: Item) -> Sample:
    before, after = _mark(reference), _mark(pruned)
    return Sample(
        task=task,
        flip=_flip(before, after),
        prompt=_cut(pruned.prompt),
        expected=_cut(pruned.expected),
        reference=_cut(reference.got),
        pruned=_cut(pruned.got),
        reference_mark=before,
        pruned_mark=after,
    )


def _answered(item: Item) -> bool:
    return bool(item.got) or item.correct is not None


def _mark(item: Item) -> Mark:
    """A generated text that is not word for word the expected one may still be good: it has its overlap, no verdict."""
    if "rouge_l" in item.scores:
        return Mark(None, f"ROUGE-L {text.decimal(item.scores['rouge_l'])}")
    return Mark(item.correct, "" if item.correct is None else "✓ right" if item.correct else "✗ wrong")


def _flip(reference: Mark, pruned: Mark) -> Flip:
    if reference.right is None or pruned.right is None:
        return "open"
    if reference.right == pruned.right:
        return "right" if pruned.right else "wrong"
    return "gained" if pruned.right else "lost"


def _cut(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} [… {len(words) - LONGEST:,} more characters]"


def _spread(pairs: Sequence[Sample]) -> list[Sample]:
    """The wanted number of each flip, one task after the other; what a flip lacks goes to the others."""
    queues = {flip: _round_robin([sample for sample in pairs if sample.flip == flip]) for flip in WANTED}
    chosen = {flip: queues[flip][:wanted] for flip, wanted in WANTED.items()}
    spare = sum(WANTED.values()) - sum(map(len, chosen.values()))
    for flip in WANTED:
        extra = queues[flip][WANTED[flip] :][:spare]
        chosen[flip] += extra
        spare -= len(extra)
    return [sample for flip in WANTED for sample in chosen[flip]]


def _round_robin(samples: Sequence[Sample]) -> list[Sample]:
    seen: dict[str, int] = {}
    turn: dict[int, int] = {}
    for position, sample in enumerate(samples):
        turn[position] = seen[sample.task] = seen.get(sample.task, -1) + 1
    return [samples[position] for position in sorted(turn, key=lambda position: (turn[position], position))]
