"""Sample answers of the dense and the pruned model to the same test items, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from prunetune.evaluation.results import Evaluation, Item, common_items, is_hidden
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
    """About a dozen items that both models answered: flips first, in turns over the tasks.

    Where there are fewer of a flip than wanted, others fill its place.
    """
    reference = reference_model(evaluations)
    if "pruned" not in evaluations or not reference:
        return AnswerSamples(reference, (), {})
    pairs: list[AnswerSample] = []
    for task, result in evaluations["pruned"].tasks.items():
        earlier = evaluations[reference].tasks.get(task)
        for after, before in common_items(result, earlier) if earlier else ():
            if after.got or after.correct is not None:
                pairs.append(_sample(task, before, after))
    counts: dict[FlipKind, int] = {flip: sum(sample.flip == flip for sample in pairs) for flip in SAMPLES_PER_FLIP}
    queues: dict[FlipKind, list[AnswerSample]] = {}
    for flip in SAMPLES_PER_FLIP:
        by_task: dict[str, list[AnswerSample]] = {}
        for sample in pairs:
            if sample.flip == flip and not is_hidden(sample.prompt):
                by_task.setdefault(sample.task, []).append(sample)
        queues[flip] = [sample for turn in zip_longest(*by_task.values()) for sample in turn if sample]
    lengths = {flip: min(wanted, len(queues[flip])) for flip, wanted in SAMPLES_PER_FLIP.items()}
    for flip, queue in queues.items():
        spare = sum(SAMPLES_PER_FLIP.values()) - sum(lengths.values())
        lengths[flip] += min(spare, len(queue) - lengths[flip])
    selected = tuple(sample for flip, queue in queues.items() for sample in queue[: lengths[flip]])
    return AnswerSamples(reference, selected, counts)


def _sample(task: str, reference: Item, pruned: Item) -> AnswerSample:
    before, after = _mark(reference), _mark(pruned)
    flip: FlipKind = "open"
    if before.is_correct is not None and after.is_correct is not None:
        same: FlipKind = "right" if after.is_correct else "wrong"
        changed: FlipKind = "gained" if after.is_correct else "lost"
        flip = same if before.is_correct == after.is_correct else changed
    prompt, expected, theirs, ours = (
        text[:MAX_CHARACTERS] + (f" [… {left_out:,} more characters]" if left_out > 0 else "")
        for text in (pruned.prompt, pruned.expected, reference.got, pruned.got)
        for left_out in [len(text) - MAX_CHARACTERS]
    )
    return AnswerSample(task, flip, prompt, expected, theirs, ours, before, after)


def _mark(item: Item) -> AnswerMark:
    """Right or wrong; of a generated text its overlap, for one that differs from the expected may still be good."""
    if "rouge_l" in item.scores:
        return AnswerMark(None, f"ROUGE-L {formatting.decimal(item.scores['rouge_l'])}")
    return AnswerMark(item.correct, "" if item.correct is None else "✓ right" if item.correct else "✗ wrong")
