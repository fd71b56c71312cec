"""Records to token ids: prompts, answers, chat templates, truncation.

Prompt and answer are tokenised separately, so that tuning and scoring split them at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record
from prunetune.errors import DataError
from prunetune.utils.deadline import RENDER_SECONDS, call_within

Messages = Sequence[tuple[str, str]]  # (role, content)
ROWS_RENDERED_AT_ONCE = 50
PROBE = "prunetune probe"  # an answer to look for in the output of a chat template


@dataclass(frozen=True)
class Example:
    """Token ids of one record. The loss counts from `answer_start` on."""

    token_ids: tuple[int, ...]
    answer_start: int  # in 1..len(token_ids); at its end, no token counts
    id: str = ""
    weight: float = 1.0


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
    examples = _encode_untruncated(records, tokenizer, config.template)
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
    within_limit = tuple(_truncate(examples[index], limit, tokenizer.bos_token_id) for index in kept)
    return EncodedExamples(within_limit, tuple(kept), len(long), max(lengths, default=0))


def _encode_untruncated(records: Sequence[Record], tokenizer: Any, template: str) -> list[Example]:
    is_chat = [uses_chat_template(record, template) for record in records]
    prompts = encode_prompts(records, tokenizer, template)
    answers = encode_answers([record.completion for record in records], tokenizer)
    text_end = [_end_of_text(tokenizer)]
    turn_end = chat_end_ids(tokenizer) if any(is_chat) else text_end
    return [
        Example((*prompt, *answer, *(turn_end if chat else text_end)), max(1, len(prompt)), record.id, record.weight)
        for record, chat, prompt, answer in zip(records, is_chat, prompts, answers, strict=True)
    ]


def uses_chat_template(record: Record, template: str) -> bool:
    """Whether the tokenizer's chat template is applied to this record."""
    return record.kind != "text" and (template == "chat" or (template == "auto" and record.kind == "chat"))


def encode_prompts(records: Sequence[Record], tokenizer: Any, template: str = "auto") -> list[list[int]]:
    """Token ids that answers are generated from or scored after; for a text row the start token, if there is one."""
    chats, raw_texts = [], []
    for record in records:
        if uses_chat_template(record, template):
            chats.append((record.messages or (("user", record.prompt),), record.source))
        elif record.kind == "chat":
            turns = [f"{role}: {content}\n" for role, content in record.messages]
            raw_texts.append("".join([*turns, "assistant:"]))
        else:
            raw_texts.append(record.prompt)
    # A chat template writes the special tokens itself.
    chat_ids = iter(_token_ids(_render_chats(tokenizer, chats, generate=True), tokenizer, special=False))
    raw_ids = iter(_token_ids(raw_texts, tokenizer, special=True))
    adds_end = bool(raw_texts) and _token_ids(["a"], tokenizer, special=True)[0][-1] == tokenizer.eos_token_id
    prompts = []
    for record in records:
        ids = next(chat_ids) if uses_chat_template(record, template) else next(raw_ids)[: -1 if adds_end else None]
        if not ids and record.kind != "text":  # without a prompt, nothing would predict the answer's first token
            start = tokenizer.bos_token_id
            ids = [_end_of_text(tokenizer) if start is None else int(start)]
        prompts.append(ids)
    return prompts


def _render_chats(tokenizer: Any, chats: Sequence[tuple[Messages, str]], *, generate: bool) -> list[str]:
    """The text of each (messages, source); some rows at a time, as a template's loops may have no end."""
    texts: list[str] = []
    for start in range(0, len(chats), ROWS_RENDERED_AT_ONCE):
        rows = chats[start : start + ROWS_RENDERED_AT_ONCE]

        def render(rows: Sequence[tuple[Messages, str]] = rows) -> list[str]:
            return [_render_chat(tokenizer, *row, generate=generate) for row in rows]

        try:
            texts += call_within(RENDER_SECONDS, render)
        except TimeoutError as endless:
            raise DataError(
                f"{rows[0][1]}: the tokenizer's chat template does not come to an end ({endless}): correct it, or set "
                "data.template=raw"
            ) from endless
    return texts


def _render_chat(tokenizer: Any, messages: Messages, source: str, *, generate: bool) -> str:
    """Messages as the tokenizer's chat template writes them; `source` begins the message of a `DataError`."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"{source}: rows of messages (of data.template=chat all) need a chat template, and the tokenizer has none; "
            "set data.template=raw, or name a model tuned for chat"
        )
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
    except (TemplateError, ValueError, TypeError, ArithmeticError, RecursionError) as refused:
        reason = " ".join(str(refused).split())[:200]
        raise DataError(
            f"{source}: the tokenizer's chat template refuses these messages ({reason}); "
            "correct the roles and their order, or set data.template=raw"
        ) from refused


def chat_end_ids(tokenizer: Any) -> list[int]:
    """Token ids that end an assistant's turn: what the chat template writes after it, else the end-of-text token."""
    ids, end = _ids_after_turn(tokenizer), _end_of_text(tokenizer)
    return ids[: ids.index(end) + 1] if end in ids else ids or [end]


def chat_stop_id(tokenizer: Any) -> int | None:
    """The special token that ends an assistant's turn, and so a generated answer; None if there is none."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
    return next((id for id in _ids_after_turn(tokenizer) if id in special), None)


def _ids_after_turn(tokenizer: Any) -> list[int]:
    """Token ids that the chat template writes after an assistant's message."""
    turns = (("user", PROBE.title()), ("assistant", PROBE))
    (text,) = _render_chats(tokenizer, [(turns, "data.template")], generate=False)
    after = text.rpartition(PROBE)[2].rstrip()
    return encode_answer(after, tokenizer) if after else []


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


def _truncate(example: Example, limit: int, bos_id: int | None) -> Example:
    """The example in `limit` tokens, without the beginning of its prompt and, if need be, the end of its answer."""
    excess = len(example.token_ids) - limit
    if excess <= 0:
        return example
    prompt, answer = example.token_ids[: example.answer_start], example.token_ids[example.answer_start :]
    prompt = truncate_prompt(prompt, max(1, len(prompt) - excess), bos_id)
    return Example((prompt + answer)[:limit], len(prompt), example.id, example.weight)


def truncate_prompt(prompt: Sequence[int], max_tokens: int, bos_id: int | None) -> tuple[int, ...]:
    """The last `max_tokens` ids of a prompt; if it begins with `bos_id`, that one and the last of the others."""
    if len(prompt) <= max_tokens:
        return tuple(prompt)
    # Models that were trained with a start token behave badly without it.
    head = prompt[:1] if prompt[0] == bos_id and max_tokens >= 2 else ()
    return (*head, *prompt[len(prompt) - max_tokens + len(head) :])
