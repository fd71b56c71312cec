"""A model in this process as one that can be asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prunetune.config.recipe import DataConfig
from prunetune.data.batches import pad_token_id
from prunetune.data.encoding import (
    Example,
    chat_end_ids,
    encode,
    encode_answers,
    encode_prompts,
    truncate_prompt,
    uses_chat_template,
)
from prunetune.data.records import Record
from prunetune.errors import DataError
from prunetune.evaluation.generation import generate
from prunetune.evaluation.likelihood import TokenizedQuestion, answer_nll, choice_loglikelihoods
from prunetune.evaluation.score_records import context_length, evaluation_mode, max_prompt_tokens
from prunetune.evaluation.suites.protocol import GenerationSettings, OnRequestsDone, RequestKind

log = logging.getLogger(__name__)
MAX_TOKENS = 16384  # of one scoring pass


class LocalModel:
    """A model and its tokenizer, as they stand: hooks and gates on the model count."""

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str = "model", fingerprint: str = "", max_tokens: int = MAX_TOKENS
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name, self.fingerprint, self.max_tokens = name, fingerprint, max_tokens

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return self.model, self.tokenizer

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """See `Respondent`. What does not fit the context loses the beginning of its prompt; a long text is weighed
        in windows."""
        with evaluation_mode(self.model):
            return {"choose": self._loglikelihood, "write": self._generate, "weigh": self._nll}[kind](
                records, settings, tick
            )

    @property
    def _pass_options(self) -> dict[str, Any]:
        return {"pad_id": pad_token_id(self.tokenizer), "max_tokens": self.max_tokens}

    def _loglikelihood(
        self, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        flat = iter(encode_answers([choice for record in records for choice in record.choices], self.tokenizer))
        choices = [tuple(tuple(next(flat)) for _ in record.choices) for record in records]
        for record, tokens in zip(records, choices, strict=True):
            if not all(tokens):
                raise DataError(f"{record.source or record.id}: choice {tokens.index(())} has no tokens")
        rooms = [max(map(len, tokens)) for tokens in choices]
        prompts = self._prompts(records, rooms, settings)
        questions = [TokenizedQuestion(prompt, tokens) for prompt, tokens in zip(prompts, choices, strict=True)]
        found = choice_loglikelihoods(self.model, questions, **self._pass_options, tick=tick)
        return [
            [[value * len(choice), len(choice)] for value, choice in zip(values, tokens, strict=True)]
            for values, tokens in zip(found, choices, strict=True)
        ]

    def _generate(self, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone) -> list[Any]:
        longest = min(settings.max_new_tokens, context_length(self.model) // 2)
        prompts = self._prompts(records, [longest] * len(records), settings)
        how = {**self._pass_options, "chats": [uses_chat_template(record, settings.template) for record in records]}
        found = generate(self.model, self.tokenizer, prompts, **how, max_new_tokens=longest, tick=tick)
        return [truncate_at_stop(answer, settings.stop) for answer in found]

    def _nll(self, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone) -> list[Any]:
        answers = iter(self._examples([record for record in records if record.kind != "text"], settings))
        parts = [self._windows(record) if record.kind == "text" else [next(answers)] for record in records]
        flat = [part for example in parts for part in example]
        found = iter(answer_nll(self.model, flat, **self._pass_options, tick=lambda _: None))
        tick(len(records))
        summed = [[next(found) for _ in example] for example in parts]
        return [
            [sum(nats for nats, _ in spans), sum(tokens for _, tokens in spans), len(record.completion.encode())]
            for spans, record in zip(summed, records, strict=True)
        ]

    def _examples(self, records: Sequence[Record], settings: GenerationSettings) -> Sequence[Example]:
        """Prompts with their right answers, without the end of text or turn, which no server would score."""
        config = DataConfig(template=settings.template, too_long="truncate")
        encoded = encode(records, self.tokenizer, config, context_length(self.model))
        self._warn_truncated(encoded.num_too_long)
        turn_end = (
            chat_end_ids(self.tokenizer)
            if any(uses_chat_template(record, settings.template) for record in records)
            else ()
        )
        ends = [len(turn_end) if uses_chat_template(record, settings.template) else 1 for record in records]
        return [
            replace(each, token_ids=each.token_ids[:-end]) for each, end in zip(encoded.examples, ends, strict=True)
        ]

    def _windows(self, record: Record) -> list[Example]:
        """The whole text, every token predicted once: from the start token, then from the last token before it."""
        start = next(
            (token for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if token is not None), 0
        )
        ids = [start, *encode_answers([record.completion], self.tokenizer)[0]]
        size = context_length(self.model) - 1
        return [Example(tuple(ids[at : at + size + 1]), 1) for at in range(0, len(ids) - 1, size)]

    def _prompts(
        self, records: Sequence[Record], reserved_tokens: Sequence[int], settings: GenerationSettings
    ) -> list[tuple[int, ...]]:
        """Token ids that leave room for so many more, but keep half the context at least."""
        whole = encode_prompts(records, self.tokenizer, settings.template)
        limits = [max_prompt_tokens(self.model, room) for room in reserved_tokens]
        self._warn_truncated(sum(len(ids) > limit for ids, limit in zip(whole, limits, strict=True)))
        return [
            truncate_prompt(ids, limit, self.tokenizer.bos_token_id) for ids, limit in zip(whole, limits, strict=True)
        ]

    def _warn_truncated(self, count: int) -> None:
        if count:
            log.warning("%d prompts lost their beginning: the model's context is %d", count, context_length(self.model))


def truncate_at_stop(answer: str, stops: Sequence[str]) -> str:
    """The answer as it came up to the first of `stops`, as servers end it; then without outer white space."""
    cuts = [place for stop in stops if (place := answer.find(stop)) >= 0]
    return answer[: min(cuts, default=len(answer))].strip()
