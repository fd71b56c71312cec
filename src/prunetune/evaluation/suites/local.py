"""A model in this process as a backend: it counts the tokens of every score of runs, `eval` and `check`."""

import logging
from collections.abc import Sequence
from typing import Any

from prunetune.data.batches import pad_token_id
from prunetune.data.encoding import (
    Example,
    chat_end_ids,
    encode_answered,
    encode_answers,
    encode_prompts,
    truncate_example,
    truncate_prompt,
    uses_chat_template,
)
from prunetune.data.records import Record
from prunetune.errors import DataError
from prunetune.evaluation.generation import generate_ids
from prunetune.evaluation.likelihood import TokenizedQuestion, answer_nll, choice_loglikelihoods
from prunetune.evaluation.scoring_mode import context_length, evaluation_mode, max_prompt_tokens
from prunetune.evaluation.suites.protocol import GenerationSettings, OnRequestsDone, RequestKind

log = logging.getLogger(__name__)
MAX_TOKENS = 16384  # of one scoring pass


class LocalModel:
    """A model and its tokenizer, as they are: hooks and gates on the model count."""

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
        """See `Backend`. A prompt that exceeds the context loses its beginning; a long text is scored in windows."""
        run = {"loglikelihood": self._loglikelihood, "generate": self._generate, "nll": self._nll}[kind]
        with evaluation_mode(self.model):
            return run(records, settings, tick)

    def fits_context(self, records: Sequence[Record], settings: GenerationSettings) -> list[bool]:
        """Whether each prompt, its longest choice and the end of a turn fit, so that no request cuts the prompt."""
        prompts = encode_prompts(records, self.tokenizer, settings.template)
        longest = [max(map(len, choices)) for choices in self._choices(records)]
        lengths = map(sum, zip(map(len, prompts), longest, self._end_lengths(records, settings), strict=True))
        return [length <= context_length(self.model) for length in lengths]

    @property
    def _pass_options(self) -> dict[str, Any]:
        return {"pad_id": pad_token_id(self.tokenizer), "max_tokens": self.max_tokens}

    def _loglikelihood(
        self, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        choices = self._choices(records)
        for record, tokens in zip(records, choices, strict=True):
            if not all(tokens):
                where = record.source or record.id
                raise DataError(f"{where}: choice {tokens.index(())} has no tokens; give it a text")
        prompts = self._prompts(records, [max(map(len, tokens)) for tokens in choices], settings)
        questions = [TokenizedQuestion(prompt, tokens) for prompt, tokens in zip(prompts, choices, strict=True)]
        means = choice_loglikelihoods(self.model, questions, **self._pass_options, tick=tick)
        return [
            [[mean * len(choice), len(choice)] for mean, choice in zip(values, tokens, strict=True)]
            for values, tokens in zip(means, choices, strict=True)
        ]

    def _choices(self, records: Sequence[Record]) -> list[tuple[tuple[int, ...], ...]]:
        flat = iter(encode_answers([choice for record in records for choice in record.choices], self.tokenizer))
        return [tuple(tuple(next(flat)) for _ in record.choices) for record in records]

    def _generate(self, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone) -> list[Any]:
        max_new_tokens = min(settings.max_new_tokens, context_length(self.model) // 2)
        answers = generate_ids(
            self.model,
            self.tokenizer,
            self._prompts(records, [max_new_tokens] * len(records), settings),
            chats=[uses_chat_template(record, settings.template) for record in records],
            max_new_tokens=max_new_tokens,
            tick=tick,
            **self._pass_options,
        )
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True) if answers else []
        return [truncate_at_stop(text, settings.stop) for text in texts]

    def _nll(self, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone) -> list[Any]:
        answers = iter(self._answers([record for record in records if record.kind != "text"], settings))
        examples = [self._windows(record) if record.kind == "text" else [next(answers)] for record in records]
        flat = [example for of_record in examples for example in of_record]
        values = iter(answer_nll(self.model, flat, **self._pass_options, tick=lambda _: None))
        tick(len(records))
        by_record = [[next(values) for _ in of_record] for of_record in examples]
        return [
            [sum(nats for nats, _ in spans), sum(tokens for _, tokens in spans), len(record.completion.encode())]
            for spans, record in zip(by_record, records, strict=True)
        ]

    def _answers(self, records: Sequence[Record], settings: GenerationSettings) -> list[Example]:
        """Prompts with their right answers, without the end of text or turn: no server would score it."""
        examples = encode_answered(records, self.tokenizer, settings.template)
        limits = [context_length(self.model) - end for end in self._end_lengths(records, settings)]
        self._warn_truncated(
            sum(len(example.token_ids) > limit for example, limit in zip(examples, limits, strict=True))
        )
        return [
            truncate_example(example, limit, self.tokenizer.bos_token_id)
            for example, limit in zip(examples, limits, strict=True)
        ]

    def _end_lengths(self, records: Sequence[Record], settings: GenerationSettings) -> list[int]:
        """Tokens that end each answer: the end of a turn for chats, of a text for others."""
        chats = [uses_chat_template(record, settings.template) for record in records]
        turn_end = chat_end_ids(self.tokenizer) if any(chats) else []
        return [len(turn_end) if is_chat else 1 for is_chat in chats]

    def _windows(self, record: Record) -> list[Example]:
        """The whole text, every token predicted once: from the start token, then from the last token before it."""
        start = next(
            (token for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if token is not None), 0
        )
        ids = encode_answers([record.completion], self.tokenizer)[0]
        ids = ids if ids[:1] == [start] else [start, *ids]
        size = context_length(self.model) - 1
        return [Example(tuple(ids[at : at + size + 1]), 1) for at in range(0, len(ids) - 1, size)]

    def _prompts(
        self, records: Sequence[Record], reserved_tokens: Sequence[int], settings: GenerationSettings
    ) -> list[tuple[int, ...]]:
        """Token ids that leave so many tokens of the context free, but keep half the context at least."""
        prompts = encode_prompts(records, self.tokenizer, settings.template)
        limits = [max_prompt_tokens(self.model, reserved) for reserved in reserved_tokens]
        self._warn_truncated(sum(len(ids) > limit for ids, limit in zip(prompts, limits, strict=True)))
        return [
            truncate_prompt(ids, limit, self.tokenizer.bos_token_id) for ids, limit in zip(prompts, limits, strict=True)
        ]

    def _warn_truncated(self, count: int) -> None:
        if count:
            log.warning("%d prompts lost their beginning: the model's context is %d", count, context_length(self.model))


def truncate_at_stop(answer: str, stops: Sequence[str]) -> str:
    """The answer up to the first of `stops`, as servers end it, without outer white space."""
    cuts = [start for stop in stops if (start := answer.find(stop)) >= 0]
    return answer[: min(cuts, default=len(answer))].strip()
