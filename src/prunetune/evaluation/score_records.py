"""All scores of a model on test records, task by task."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunetune.config.recipe import DataConfig, EvaluateConfig
from prunetune.data.batches import pad_token_id
from prunetune.data.encoding import Example, encode, encode_answer, truncate_prompt, uses_chat_template
from prunetune.data.records import Record
from prunetune.errors import DataError
from prunetune.evaluation import likelihood
from prunetune.evaluation.batching import OnItemsDone
from prunetune.evaluation.generation import generate
from prunetune.evaluation.results import Evaluation, Item, TaskResult
from prunetune.evaluation.statistics import aggregate_items
from prunetune.evaluation.text_metrics import exact_match, rouge_l
from prunetune.model.lm_head import select_head_inputs

SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

ProgressCallback = Callable[[str, int, int], None]  # task, passes done, passes in all


def evaluate(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    data: DataConfig,
    config: EvaluateConfig,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Score `model` on `records`, grouped by task, on the device it is on.

    Records with choices: accuracy by mean log-likelihood per token, and macro-F1 where all share one set of choices.
    Other answers: ROUGE-L and exact match of greedy generations. All answers: NLL per token. Texts: perplexity.
    Raises `DataError` where there is nothing to score or a record does not fit the model's context.
    """
    if not records:
        raise DataError("no test records to evaluate; name some in data.test, or raise data.test_share")
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    with evaluation_mode(model):
        return Evaluation(
            {
                task: _TaskEvaluator(model, tokenizer, data, config, task, progress).result(
                    stable_sample(members, config.limit)
                )
                for task, members in by_task.items()
            }
        )


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # cuDNN's attention answers a wholly masked row, as padding on the left makes them, with NaN.
        with torch.inference_mode(), sdpa_kernel(SDPA_BACKENDS), select_head_inputs(model):
            yield
    finally:
        for module in training:
            module.training = True


class HasId(Protocol):
    """What has a name of its own."""

    @property
    def id(self) -> str: ...


HasIdT = TypeVar("HasIdT", bound=HasId)


def stable_sample(records: Sequence[HasIdT], limit: int) -> list[HasIdT]:
    """The first `limit` (0: all) in an order that depends on nothing but ids: more data does not reshuffle the rest."""
    shuffled = sorted(records, key=lambda record: hashlib.sha256(record.id.encode()).digest())
    return shuffled[:limit] if limit else shuffled


@dataclass
class _Draft:
    """An item that is being scored."""

    record: Record
    example: Example
    got: str = ""
    correct: bool | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _TaskEvaluator:
    """One task's evaluation; its parts fill in drafts."""

    model: Any
    tokenizer: Any
    data: DataConfig
    config: EvaluateConfig
    task: str
    progress: ProgressCallback | None

    def result(self, records: Sequence[Record]) -> TaskResult:
        drafts = self._encoded(records)
        asked = [draft for draft in drafts if _has_choices(draft.record)]
        others = [draft for draft in drafts if not _has_choices(draft.record)]
        written = [draft for draft in others if draft.record.kind != "text"][: self.config.generate_limit]
        tick = self._ticker(len(drafts) + len(written))
        if asked:
            self._score_choices(asked, tick)
        if others:
            self._score_nll(others, tick)
        if written:
            self._score_generations(written, tick)
        return self._summary(drafts)

    def _encoded(self, records: Sequence[Record]) -> list[_Draft]:
        """The records that fit the model's context; `data.too_long` says what becomes of the others."""
        numbered = [replace(record, id=str(index)) for index, record in enumerate(records)]
        encoded = encode(numbered, self.tokenizer, self.data, context_length(self.model))
        if not encoded.examples:
            raise DataError(
                f"task {self.task!r}: all {len(records)} test rows are longer than data.max_length or the model's "
                f"context of {context_length(self.model)} tokens; set data.too_long=truncate"
            )
        return [_Draft(records[int(example.id)], example) for example in encoded.examples]

    def _ticker(self, total: int) -> OnItemsDone:
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress(self.task, done, total)

        return tick

    def _score_choices(self, drafts: Sequence[_Draft], tick: OnItemsDone) -> None:
        found = likelihood.choice_loglikelihoods(
            self.model,
            [self._question(draft) for draft in drafts],
            pad_id=pad_token_id(self.tokenizer),
            max_tokens=self.config.max_tokens,
            tick=tick,
        )
        for draft, likelihoods in zip(drafts, found, strict=True):
            *likelihoods, whole_answer = likelihoods
            draft.scores |= {"nll": -whole_answer, "tokens": float(len(answer_token_ids(draft.example)))}
            best = argmax_unless_nan(likelihoods)
            if best is None:
                draft.scores["accuracy"] = math.nan
            else:
                draft.got, draft.correct = draft.record.choices[best], best == draft.record.answer
                draft.scores["accuracy"] = float(draft.correct)

    def _question(self, draft: _Draft) -> likelihood.TokenizedQuestion:
        """The choices, and last the answer with its end: its NLL comes out of the same pass."""
        choices = tuple(tuple(encode_answer(choice, self.tokenizer)) for choice in draft.record.choices)
        if not all(choices):
            where = draft.record.source or draft.record.id
            raise DataError(f"{where}: choice {choices.index(())} has no tokens; give it a text")
        choices += (answer_token_ids(draft.example),)
        return likelihood.TokenizedQuestion(self._prompt(draft, room=max(len(choice) for choice in choices)), choices)

    def _prompt(self, draft: _Draft, *, room: int) -> tuple[int, ...]:
        """The prompt's tokens, cut from the beginning where `room` more would not fit."""
        prompt = draft.example.token_ids[: draft.example.answer_start]
        return truncate_prompt(prompt, max_prompt_tokens(self.model, room), self.tokenizer.bos_token_id)

    def _score_nll(self, drafts: Sequence[_Draft], tick: OnItemsDone) -> None:
        found = likelihood.answer_nll(
            self.model,
            [draft.example for draft in drafts],
            pad_id=pad_token_id(self.tokenizer),
            max_tokens=self.config.max_tokens,
            tick=tick,
        )
        for draft, (total, tokens) in zip(drafts, found, strict=True):
            draft.scores |= {"nll": total / tokens, "tokens": float(tokens)}

    def _score_generations(self, drafts: Sequence[_Draft], tick: OnItemsDone) -> None:
        written = generate(
            self.model,
            self.tokenizer,
            [self._prompt(draft, room=self.config.max_new_tokens) for draft in drafts],
            chats=[uses_chat_template(draft.record, self.data.template) for draft in drafts],
            pad_id=pad_token_id(self.tokenizer),
            max_new_tokens=min(self.config.max_new_tokens, context_length(self.model) // 2),
            max_tokens=self.config.max_tokens,
            tick=tick,
        )
        answers = [answer.strip() for answer in written]
        overlaps = rouge_l([draft.record.completion for draft in drafts], answers)
        for draft, answer, overlap in zip(drafts, answers, overlaps, strict=True):
            draft.got, draft.correct = answer, exact_match(draft.record.completion, answer)
            draft.scores |= {"rouge_l": overlap, "exact_match": float(draft.correct)}

    def _summary(self, drafts: Sequence[_Draft]) -> TaskResult:
        names = make_ids_unique([draft.record.id for draft in drafts])
        items = [_item(name, draft) for name, draft in zip(names, drafts, strict=True)]
        metrics = ("accuracy", "rouge_l", "exact_match")
        over = {metric: [item for item in items if metric in item.scores] for metric in metrics}
        over["macro_f1"] = over["accuracy"] if _one_label_set(drafts) else []
        over["nll"] = [item for item, draft in zip(items, drafts, strict=True) if draft.record.kind != "text"]
        over["perplexity"] = [item for item, draft in zip(items, drafts, strict=True) if draft.record.kind == "text"]
        scores = {metric: aggregate_items(members, metric) for metric, members in over.items() if members}
        return TaskResult(self.task, scores, tuple(items))


def context_length(model: Any) -> int:
    """Most tokens that the model was made for."""
    return int(model.config.get_text_config().max_position_embeddings)


def max_prompt_tokens(model: Any, reserved_tokens: int) -> int:
    """Most tokens of a prompt that `room` more are to follow; half the context at least."""
    return max(context_length(model) - reserved_tokens, context_length(model) // 2)


def answer_token_ids(example: Example) -> tuple[int, ...]:
    """The tokens that loss counts, the end included."""
    return example.token_ids[example.answer_start :]


def argmax_unless_nan(likelihoods: Sequence[float]) -> int | None:
    """The first of the likeliest; None where one is nan."""
    if any(math.isnan(value) for value in likelihoods):
        return None
    return likelihoods.index(max(likelihoods))


def make_ids_unique(names: Sequence[str]) -> list[str]:
    """Names that repeat get "#2", "#3", so that two evaluations can be compared item by item."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def _has_choices(record: Record) -> bool:
    return record.answer is not None and len(record.choices) > 0


def _one_label_set(drafts: Sequence[_Draft]) -> bool:
    sets = [frozenset(draft.record.choices) for draft in drafts if _has_choices(draft.record)]
    return len(sets) > 1 and len(set(sets)) == 1


def _item(name: str, draft: _Draft) -> Item:
    record = draft.record
    if record.kind == "text":
        return Item(name, record.completion, "", "", None, draft.scores)
    asked = "\n".join(f"{role}: {content}" for role, content in record.messages) if record.messages else record.prompt
    expected = record.completion if record.answer is None else record.choices[record.answer]
    return Item(name, asked, expected, draft.got, draft.correct, draft.scores)
