"""Sample answers of the dense and the pruned model to the same test items, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prunetune.evaluation.results import Evaluation, Item, is_hidden
from prunetune.report import formatting
from prunetune.report.scores import reference_model

FlipKind = Literal["lost", "gained", "right", "wrong", "open"]

SAMPLES_PER_FLIP: dict[FlipKind, int] = {"lost": 4, "gained": 3, "open": 3, "right": 1, "wrong": 1}
MAX_CHARACTERS = 4_000  # characters of any one text


@dataclass(frozen=True)
class AnswerMark:
    """Whether an answer is right, as far as it can be said."""

    is_correct: bool | None  # None for a generated text, which has no right and wrong
    label: str


@dataclass(frozen=True)
class AnswerSample:
    """One test item with both answers."""

    task: str
    flip: FlipKind
    prompt: str
    expected: str
    reference: str
    pruned: str
    reference_mark: AnswerMark
    pruned_mark: AnswerMark


@dataclass(frozen=True)
class AnswerSamples:
    """The chosen samples, and how all paired items changed."""

    reference: str  # "tuned" or "dense", "" where there is none
    selected: tuple[AnswerSample, ...]
    counts: Mapping[FlipKind, int]


def select_samples(evaluations: Mapping[str, Evaluation]) -> AnswerSamples:
    """About a dozen items that both models answered: flips first, spread over the tasks."""
    reference = reference_model(evaluations)
    if "pruned" not in evaluations or not reference:
        return AnswerSamples(reference, (), {})
    pairs = _paired_answers(evaluations[reference], evaluations["pruned"])
    counts: dict[FlipKind, int] = {flip: sum(sample.flip == flip for sample in pairs) for flip in SAMPLES_PER_FLIP}
    shown = [pair for pair in pairs if not is_hidden(pair.prompt)]
    return AnswerSamples(reference, tuple(_select_per_flip(shown)), counts)


def _paired_answers(reference: Evaluation, pruned: Evaluation) -> list[AnswerSample]:
    pairs = []
    for task, result in pruned.tasks.items():
        before = {item.id: item for item in reference.tasks[task].items} if task in reference.tasks else {}
        answered = [item for item in result.items if item.got or item.correct is not None]
        pairs += [_sample(task, before[item.id], item) for item in answered if item.id in before]
    return pairs


def _sample(task: str, reference: Item, pruned: Item) -> AnswerSample:
    before, after = _mark(reference), _mark(pruned)
    return AnswerSample(
        task=task,
        flip=_flip_kind(before, after),
        prompt=_truncate(pruned.prompt),
        expected=_truncate(pruned.expected),
        reference=_truncate(reference.got),
        pruned=_truncate(pruned.got),
        reference_mark=before,
        pruned_mark=after,
    )


def _mark(item: Item) -> AnswerMark:
    """Right or wrong; of a generated text its overlap, for one that differs from the expected may still be good."""
    if "rouge_l" in item.scores:
        return AnswerMark(None, f"ROUGE-L {formatting.decimal(item.scores['rouge_l'])}")
    return AnswerMark(item.correct, "" if item.correct is None else "✓ right" if item.correct else "✗ wrong")


def _flip_kind(reference: AnswerMark, pruned: AnswerMark) -> FlipKind:
    if reference.is_correct is None or pruned.is_correct is None:
        return "open"
    if reference.is_correct == pruned.is_correct:
        return "right" if pruned.is_correct else "wrong"
    return "gained" if pruned.is_correct else "lost"


def _truncate(text: str) -> str:
    left_out = len(text) - MAX_CHARACTERS
    return text if left_out <= 0 else f"{text[:MAX_CHARACTERS]} [… {left_out:,} more characters]"


def _select_per_flip(pairs: Sequence[AnswerSample]) -> list[AnswerSample]:
    """The wanted number of each flip, in turns over the tasks; where a flip has fewer, others fill its place."""
    queues = {flip: _round_robin([sample for sample in pairs if sample.flip == flip]) for flip in SAMPLES_PER_FLIP}
    chosen = {flip: queues[flip][:wanted] for flip, wanted in SAMPLES_PER_FLIP.items()}
    spare = sum(SAMPLES_PER_FLIP.values()) - sum(map(len, chosen.values()))
    for flip in SAMPLES_PER_FLIP:
        extra = queues[flip][SAMPLES_PER_FLIP[flip] :][:spare]
        chosen[flip] += extra
        spare -= len(extra)
    return [sample for flip in SAMPLES_PER_FLIP for sample in chosen[flip]]


def _round_robin(samples: Sequence[AnswerSample]) -> list[AnswerSample]:
    counts: Counter[str] = Counter()
    turns = []  # of each sample within its task
    for sample in samples:
        turns.append(counts[sample.task])
        counts[sample.task] += 1
    return [samples[position] for position in sorted(range(len(samples)), key=turns.__getitem__)]
