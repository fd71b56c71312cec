"""Records to token ids: prompts, answers, which tokens carry loss, truncation.

Prompt and answer are tokenised separately, so that tuning and scoring split them at the same place; but a chat whose
template marks generations is tokenised as a whole, as TRL does.
"""

import logging
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, compress, pairwise
from typing import Any

from prunetune.config.recipe import DataConfig
from prunetune.data.chat_template import Loss, Span, TurnEnd, gaps_between, render_answered, render_prompts
from prunetune.data.records import REASONING_FIELDS, Record
from prunetune.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """Token ids of one record. The loss counts from `answer_start` on, but for `no_loss`."""

    token_ids: tuple[int, ...]
    answer_start: int  # in 1..len(token_ids); at its end, no token counts
    id: str = ""  # "file:line"; without one, that of the record
    weight: float = 1.0
    no_loss: tuple[Span, ...] = ()  # of token_ids, in order: what others say between an assistant's turns

    @property
    def loss_spans(self) -> list[Span]:
        """The spans of `token_ids` that carry loss, in order."""
        skipped = [span for span in self.no_loss if span[0] >= self.answer_start]
        return gaps_between(skipped, self.answer_start, len(self.token_ids))

    @property
    def loss_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(end - start for start, end in self.loss_spans)


@dataclass(frozen=True)
class EncodedExamples:
    """Examples within the limit on length, and how many records were beyond it."""

    examples: tuple[Example, ...]
    kept_indices: tuple[int, ...]  # examples[i] is of record kept_indices[i]
    num_too_long: int  # records that were truncated or dropped
    longest: int  # tokens, before truncation


def encode_answer(text: str, tokenizer: Any) -> list[int]:
    """Token ids of an answer or a choice, without special tokens."""
    return encode_answers([text], tokenizer)[0]


def encode_answers(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """`encode_answer` of many texts at once."""
    return _token_ids(texts, tokenizer, special=False)


def encode(records: Sequence[Record], tokenizer: Any, config: DataConfig, context_length: int) -> EncodedExamples:
    """Every record as an example of at most `data.max_length` and `context_length` tokens.

    Longer records are truncated or dropped, as `data.too_long` says. Raises `DataError` for them if that is "error",
    and for a tokenizer without an end-of-text token or, where records need it, a chat template.
    """
    limit = min(config.max_length or context_length, context_length)
    if limit < 2:
        raise DataError(f"data.max_length is {limit}: an example needs 2 tokens at least; raise it")
    is_chat = [record.kind == "chat" and uses_chat_template(record, config.template) for record in records]
    chats = iter(_encode_chats(list(compress(records, is_chat)), tokenizer, config.loss))
    pairs = iter(
        _encode_pairs([row for row, chat in zip(records, is_chat, strict=True) if not chat], tokenizer, config)
    )
    examples = [next(chats if chat else pairs) for chat in is_chat]
    lengths = [len(example.token_ids) for example in examples]
    long = [index for index, length in enumerate(lengths) if length > limit]
    if long and config.too_long == "error":
        advice = f"take a model with more context (data.max_length cannot pass its {context_length})"
        if limit < context_length:
            advice = f"raise data.max_length (the model's context is {context_length})"
        raise DataError(
            f"{len(long)} of {len(records)} rows have more than {limit} tokens (longest {max(lengths)}), "
            f"first {records[long[0]].source}; set data.too_long=truncate or data.too_long=drop, or {advice}"
        )
    kept = [index for index, length in enumerate(lengths) if length <= limit or config.too_long == "truncate"]
    within_limit = tuple(truncate_example(examples[index], limit, tokenizer.bos_token_id) for index in kept)
    return EncodedExamples(within_limit, tuple(kept), len(long), max(lengths, default=0))


def _encode_pairs(records: Sequence[Record], tokenizer: Any, config: DataConfig) -> list[Example]:
    """Prompts with their answers, texts, and chats without a template."""
    fields_read = ["".join([record.answer_fields, *(turn.fields for turn in record.messages)]) for record in records]
    for field in REASONING_FIELDS:
        if count := sum(f'"{field}": ' in fields for fields in fields_read):
            log.warning("%s is not written without a chat template, so it is not tuned on (%d rows)", field, count)
    text_end, by_template = [_end_of_text(tokenizer)], config.template == "chat"
    turn_end = TurnEnd.of(tokenizer, records[0].source).closing if by_template and records else ""
    examples = []
    for record, example in zip(records, encode_answered(records, tokenizer, config.template), strict=True):
        closing = turn_end if uses_chat_template(record, config.template) else ""
        ids, answer = list(example.token_ids), example.answer_start
        if not record.completion.rstrip().endswith(closing or tokenizer.eos_token):  # no second end
            ids += encode_answer(closing, tokenizer) if closing else text_end
        turns = _raw_answers(record, tokenizer, answer) if record.messages and config.loss != "last" else []
        spans = [span for span, has_loss in turns if has_loss == (config.loss == "assistants")]
        spans = gaps_between(spans, 1, len(ids)) if config.loss == "all" else [*spans, (answer, len(ids))]
        examples.append(_example_of(ids, spans, record))
    return examples


def _encode_chats(records: Sequence[Record], tokenizer: Any, loss: Loss) -> list[Example]:
    """Chats as the chat template writes them, up to the end of their last answer."""
    rendered = render_answered(tokenizer, records, loss)
    for field, count in Counter(field for chat in rendered for field in chat.unread).items():
        log.warning("%s is not written by the chat template, so it is not tuned on (%d rows)", field, count)
    prompts = _tokenize_with_spans([(chat.prompt, chat.loss) for chat in rendered], tokenizer)
    answers = encode_answers([chat.answer for chat in rendered], tokenizer)
    examples = []
    for record, chat, (prompt, spans), answer in zip(records, rendered, prompts, answers, strict=True):
        needs_end = chat.lacks_end and not chat.answer.endswith(tokenizer.eos_token)
        ids = [*prompt, *answer, *([_end_of_text(tokenizer)] if needs_end else [])]
        examples.append(_example_of(ids, [*spans, (len(prompt), len(ids))], record))
    return examples


def _example_of(ids: Sequence[int], spans: Sequence[Span], record: Record) -> Example:
    """The record's tokens up to the last that carries loss; the first, which nothing predicts, carries none."""
    spans = [(max(1, start), end) for start, end in spans if end > max(1, start)]
    if not spans:
        raise DataError(f"{record.source}: no token of the row carries loss; remove the row, or change data.loss")
    start, end = spans[0][0], spans[-1][1]
    return Example(
        tuple(ids[:end]), start, record.source or record.id, record.weight, tuple(gaps_between(spans, start, end))
    )


def encode_answered(records: Sequence[Record], tokenizer: Any, template: str = "auto") -> list[Example]:
    """Prompts, each with its right answer and without the end of text or turn: what is scored."""
    prompts = encode_prompts(records, tokenizer, template)
    answers = encode_answers([record.completion for record in records], tokenizer)
    examples = []
    for record, prompt, answer in zip(records, prompts, answers, strict=True):
        if record.kind == "text" and answer[:1] == prompt:  # the text has its own start token
            prompt = []
        examples.append(Example((*prompt, *answer), max(1, len(prompt)), record.source or record.id, record.weight))
    return examples


def uses_chat_template(record: Record, template: str) -> bool:
    """Whether the tokenizer's chat template is applied to this record."""
    return record.kind != "text" and (template == "chat" or (template == "auto" and record.kind == "chat"))


def encode_prompts(records: Sequence[Record], tokenizer: Any, template: str = "auto") -> list[list[int]]:
    """Token ids that answers are generated from or scored after; for a text row the start token, if there is one."""
    is_chat = [uses_chat_template(record, template) for record in records]
    rendered = render_prompts(tokenizer, [record for record, chat in zip(records, is_chat, strict=True) if chat])
    raw = [record for record, chat in zip(records, is_chat, strict=True) if not chat]
    # A chat template writes the special tokens itself.
    chat_ids = iter(_token_ids(rendered, tokenizer, special=False))
    raw_ids = iter(_token_ids([raw_prompt(record) for record in raw], tokenizer, special=True))
    adds_end = bool(raw) and _token_ids(["a"], tokenizer, special=True)[0][-1] == tokenizer.eos_token_id
    prompts = []
    for record, chat in zip(records, is_chat, strict=True):
        ids = next(chat_ids) if chat else next(raw_ids)[: -1 if adds_end else None]
        if not chat and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
            ids = ids[1:]  # the text has its own start token
        if not ids and record.kind != "text":  # without a prompt, nothing would predict the answer's first token
            start = tokenizer.bos_token_id
            ids = [_end_of_text(tokenizer) if start is None else int(start)]
        prompts.append(ids)
    return prompts


def raw_prompt(record: Record) -> str:
    """The prompt without a chat template; tools and their calls are JSON in it."""
    if record.kind != "chat":
        return record.prompt
    return "".join([*_raw_turns(record), "assistant:"])


def _raw_turns(record: Record) -> list[str]:
    tools = f"tools: {record.tools}\n" if record.tools else ""
    return [tools, *(f"{message.role}: {message.content}\n" for message in record.messages)]


def _raw_answers(record: Record, tokenizer: Any, prompt_length: int) -> list[tuple[Span, bool]]:
    """Earlier answers in the raw prompt of a chat: (span of tokens, whether it is tuned on)."""
    ends = accumulate(map(len, _raw_turns(record)))
    turns = zip(pairwise(ends), record.messages, strict=True)
    answers = [(span, message.has_loss) for span, message in turns if message.role == "assistant"]
    if not answers:
        return []
    places = [(start + len("assistant:"), end) for (start, end), _ in answers]
    ((ids, spans),) = _tokenize_with_spans([(raw_prompt(record), places)], tokenizer)
    shift = prompt_length - len(ids)  # by a start token
    return [((start + shift, end + shift), loss) for (start, end), (_, loss) in zip(spans, answers, strict=True)]


def chat_end_ids(tokenizer: Any) -> list[int]:
    """Token ids that end an assistant's turn: what the chat template writes after it, else the end-of-text token."""
    return encode_answer(TurnEnd.of(tokenizer).closing, tokenizer) or [_end_of_text(tokenizer)]


def chat_stop_id(tokenizer: Any) -> int | None:
    """The special token that ends an assistant's turn, and so a generated answer; None if there is none."""
    stop = TurnEnd.of(tokenizer).stop
    return int(tokenizer.convert_tokens_to_ids(stop)) if stop else None


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no end-of-text token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def _token_ids(texts: Sequence[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    """Token ids of each text; `special` lets the tokenizer add the special tokens that it puts around a text."""
    if not texts:
        return []
    # verbose=False: `encode` checks the length, not the tokenizer's own warning.
    encoded = tokenizer(list(texts), add_special_tokens=special, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _tokenize_with_spans(
    texts: Sequence[tuple[str, Sequence[Span]]], tokenizer: Any
) -> list[tuple[list[int], list[Span]]]:
    """Token ids of each text, without special tokens around it, and its spans of characters as spans of tokens."""
    if not texts:
        return []
    results = []
    if not tokenizer.is_fast:  # it does not say where its tokens are: pieces are tokenised one by one
        for text, spans in texts:
            edges = sorted({0, len(text), *chain.from_iterable(spans)})
            pieces = _token_ids([text[start:end] for start, end in pairwise(edges)], tokenizer, special=False)
            place = dict(zip(edges, accumulate(map(len, pieces), initial=0), strict=True))
            results.append((list(chain.from_iterable(pieces)), [(place[start], place[end]) for start, end in spans]))
        return results
    encoded = tokenizer(
        [text for text, _ in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    for (_, spans), ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        token_spans = []
        for start, end in spans:
            last = bisect_left(starts, end)
            while last < len(ends) and ends[last] == end:  # white space, which some tokenizers give no place
                last += 1
            token_spans.append((bisect_right(ends, start), last))
        results.append((list(ids), token_spans))
    return results


def truncate_example(example: Example, limit: int, bos_id: int | None) -> Example:
    """The example in `limit` tokens, without the beginning of its prompt and, if need be, the end of its answer.

    The prompt of a chat is all before its last answer, which is kept longest.
    """
    excess = len(example.token_ids) - limit
    if excess <= 0:
        return example
    spans = example.loss_spans
    answer_start = spans[-1][0]
    prompt = truncate_prompt(example.token_ids[:answer_start], max(1, answer_start - excess), bos_id)
    ids = (*prompt, *example.token_ids[answer_start:])[:limit]
    cut = answer_start - len(prompt)
    kept = [(max(1, start - cut), min(limit, end - cut)) for start, end in spans if end - cut > 1]
    return replace(
        example, token_ids=ids, answer_start=kept[0][0], no_loss=tuple(gaps_between(kept, kept[0][0], limit))
    )


def truncate_prompt(prompt: Sequence[int], max_tokens: int, bos_id: int | None) -> tuple[int, ...]:
    """The last `max_tokens` ids of a prompt; if it begins with `bos_id`, that one and the last of the others."""
    if len(prompt) <= max_tokens:
        return tuple(prompt)
    # Models that were trained with a start token behave badly without it.
    head = prompt[:1] if prompt[0] == bos_id and max_tokens >= 2 else ()
    return (*head, *prompt[len(prompt) - max_tokens + len(head) :])
