"""Records as token ids. Prompt and answer are tokenised apart, so tuning and scoring see the same boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record
from prunetune.errors import DataError

PROBE = "prunetune probe"  # an answer to look for in what a chat template renders


@dataclass(frozen=True)
class Example:
    """Token ids of one record. Loss counts from `answer_from` on; 0 < answer_from <= len(ids), where nothing counts."""

    token_ids: tuple[int, ...]
    answer_start: int
    id: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class EncodedExamples:
    """Examples that fit, and what the limit on length did."""

    examples: tuple[Example, ...]
    kept_indices: tuple[int, ...]  # examples[i] is of record kept[i]
    num_too_long: int  # how many were cut or dropped
    longest: int  # tokens, before cutting


def encode_prompt(record: Record, tokenizer: Any, template: str = "auto") -> list[int]:
    """Token ids that an answer is generated from or scored after; for text rows the start token, if there is one."""
    return _prompts([record], tokenizer, template)[0]


def encode_answer(text: str, tokenizer: Any) -> list[int]:
    """Token ids of an answer or a choice, without any special token."""
    return _tokens([text], tokenizer, special=False)[0]


def encode_prompts(records: Sequence[Record], tokenizer: Any, template: str = "auto") -> list[list[int]]:
    """`encode_prompt` of many at once."""
    return _prompts(records, tokenizer, template)


def encode_answers(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """`encode_answer` of many at once."""
    return _tokens(texts, tokenizer, special=False)


def encode(records: Sequence[Record], tokenizer: Any, config: DataConfig, context_length: int) -> EncodedExamples:
    """Every record as an example of at most data.max_length and `context` tokens; "drop" may leave none.

    Raises `DataError` where records are longer and data.too_long is "error", and for a tokenizer without what the
    template or an end of text needs.
    """
    limit = min(config.max_length or context_length, context_length)
    if limit < 2:
        raise DataError(f"data.max_length is {limit}: an example needs 2 tokens at least; raise it")
    examples = _encode_untruncated(records, tokenizer, config.template)
    lengths = [len(example.token_ids) for example in examples]
    long = [index for index, length in enumerate(lengths) if length > limit]
    if long and config.too_long == "error":
        raise _too_long(records, lengths, long, limit, context_length)
    kept = [index for index, length in enumerate(lengths) if length <= limit or config.too_long == "truncate"]
    fitting = tuple(_cut(examples[index], limit, tokenizer.bos_token_id) for index in kept)
    return EncodedExamples(fitting, tuple(kept), len(long), max(lengths, default=0))


def _encode_untruncated(records: Sequence[Record], tokenizer: Any, template: str) -> list[Example]:
    chats = [uses_chat_template(record, template) for record in records]
    prompts = _prompts(records, tokenizer, template)
    answers = _tokens([record.completion for record in records], tokenizer, special=False)
    end = [_end_of_text(tokenizer)]
    turn_end = chat_end_ids(tokenizer) if any(chats) else end
    return [
        Example((*prompt, *answer, *(turn_end if chat else end)), max(1, len(prompt)), record.id, record.weight)
        for record, chat, prompt, answer in zip(records, chats, prompts, answers, strict=True)
    ]


def uses_chat_template(record: Record, template: str) -> bool:
    """Whether the tokenizer's chat template wraps this record."""
    return record.kind != "text" and (template == "chat" or (template == "auto" and record.kind == "chat"))


def _prompts(records: Sequence[Record], tokenizer: Any, template: str) -> list[list[int]]:
    chats = [record for record in records if uses_chat_template(record, template)]
    raws = [record for record in records if not uses_chat_template(record, template)]
    # A chat template writes the special tokens itself.
    rendered = iter(_tokens([_rendered(record, tokenizer) for record in chats], tokenizer, special=False))
    plain = iter(_tokens([_raw(record) for record in raws], tokenizer, special=True))
    adds_end = bool(raws) and _tokens(["a"], tokenizer, special=True)[0][-1] == tokenizer.eos_token_id
    prompts = []
    for record in records:
        ids = next(rendered) if uses_chat_template(record, template) else next(plain)[: -1 if adds_end else None]
        # A prompt of no tokens leaves nothing that predicts the answer's first.
        prompts.append(ids if ids or record.kind == "text" else [_start_of_text(tokenizer)])
    return prompts


def _raw(record: Record) -> str:
    if record.kind != "chat":
        return record.prompt
    turns = [f"{role}: {content}\n" for role, content in record.messages]
    return "".join([*turns, "assistant:"])


def _rendered(record: Record, tokenizer: Any) -> str:
    messages = record.messages or (("user", record.prompt),)
    return _render(tokenizer, messages, record.source, generate=True)


def _render(tokenizer: Any, messages: Sequence[tuple[str, str]], source: str, *, generate: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"{source}: rows of messages (of data.template=chat all) need a chat template, and the tokenizer has none; "
            "set data.template=raw, or name a model tuned for chat"
        )
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except (TemplateError, ValueError, TypeError) as refused:
        reason = " ".join(str(refused).split())[:200]
        raise DataError(
            f"{source}: the tokenizer's chat template refuses these messages ({reason}); "
            "correct the roles and their order, or set data.template=raw"
        ) from refused


def chat_end_ids(tokenizer: Any) -> list[int]:
    """Token ids that close an assistant's turn: what the chat template puts after it, else the end of text."""
    ids, end = _after_turn(tokenizer), _end_of_text(tokenizer)
    return ids[: ids.index(end) + 1] if end in ids else ids or [end]


def chat_stop_id(tokenizer: Any) -> int | None:
    """The special token that closes an assistant's turn, where a written answer is over; None where there is none."""
    added, named = tokenizer.added_tokens_decoder, tokenizer.all_special_ids
    special = {*named, *(token for token, about in added.items() if about.special)}
    return next((token for token in _after_turn(tokenizer) if token in special), None)


def _after_turn(tokenizer: Any) -> list[int]:
    turns = (("user", PROBE.title()), ("assistant", PROBE))
    after = _render(tokenizer, turns, "data.template", generate=False).rpartition(PROBE)[2].rstrip()
    return encode_answer(after, tokenizer) if after else []


def _end_of_text(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer names no end-of-text token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


def _start_of_text(tokenizer: Any) -> int:
    start = tokenizer.bos_token_id
    return _end_of_text(tokenizer) if start is None else int(start)


def _tokens(texts: Sequence[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: the length is judged here, not by the tokenizer's own warning.
    encoded = tokenizer(list(texts), add_special_tokens=special, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _cut(example: Example, limit: int, start: int | None) -> Example:
    """The example in `limit` tokens: what goes first is the beginning of the prompt, then the end of the answer."""
    excess = len(example.token_ids) - limit
    if excess <= 0:
        return example
    prompt, answer = example.token_ids[: example.answer_start], example.token_ids[example.answer_start :]
    prompt = truncate_prompt(prompt, max(1, len(prompt) - excess), start)
    return Example((prompt + answer)[:limit], len(prompt), example.id, example.weight)


def truncate_prompt(prompt: Sequence[int], max_tokens: int, bos_id: int | None) -> tuple[int, ...]:
    """The last `size` ids of a prompt; where it begins with the `start` token, that one stays and another goes."""
    if len(prompt) <= max_tokens:
        return tuple(prompt)
    # Models that start every text with one token behave badly without it.
    head = prompt[:1] if prompt[0] == bos_id and max_tokens >= 2 else ()
    return (*head, *prompt[len(prompt) - max_tokens + len(head) :])


def _too_long(
    records: Sequence[Record], lengths: Sequence[int], long: Sequence[int], limit: int, context: int
) -> DataError:
    room = (
        f"raise data.max_length (the model's context is {context})"
        if limit < context
        else f"take a model with more context (data.max_length cannot pass its {context})"
    )
    return DataError(
        f"{len(long)} of {len(records)} rows have more than {limit} tokens (longest {max(lengths)}), "
        f"first {records[long[0]].source}; set data.too_long=truncate or data.too_long=drop, or {room}"
    )
