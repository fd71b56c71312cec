"""Chats as the tokenizer's chat template writes them, and the characters of them that carry loss."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

from prunetune.data.records import Message, Record
from prunetune.errors import DataError
from prunetune.utils.deadline import RENDER_SECONDS, call_within
from prunetune.utils.untrusted import parse_json

T = TypeVar("T", "Record", "Chat")
R = TypeVar("R")
Span = tuple[int, int]  # [start, end)
Loss = Literal["assistants", "last", "all"]
ROWS_RENDERED_AT_ONCE = 50
PROBE = "prunetune probe"  # an answer to look for in the output of a chat template
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TOOL_FIELDS = ("tools", "tool_calls")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Chat:
    """What a chat template reads."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    has_loss: tuple[bool, ...]  # by message; only an assistant's count
    source: str  # begins the message of a `DataError`

    @classmethod
    def from_record(cls, record: Record, *, answered: bool) -> Chat:
        """The messages of a record up to its answer, or with it; a prompt is one user message."""
        messages = record.messages or (Message("user", record.prompt),)
        if answered:
            messages += (Message("assistant", record.completion, record.answer_fields),)
        tools = tuple(json.loads(record.tools)) if record.tools else ()
        turns = tuple(message.as_dict() for message in messages)
        return cls(turns, tools, tuple(message.has_loss for message in messages), record.source)

    def without(self, field: str) -> Chat:
        """The chat without its tools, or without a field of its messages."""
        messages = ({key: value for key, value in message.items() if key != field} for message in self.messages)
        return replace(self, messages=tuple(messages), tools=() if field == "tools" else self.tools)


@dataclass(frozen=True)
class RenderedChat:
    """The text of a chat with its answer."""

    text: str
    loss: tuple[Span, ...]  # characters that carry loss, in order
    lacks_end: bool = False  # the template writes no end after the last answer
    unread: tuple[str, ...] = ()  # fields of reasoning that the template does not write


def render_prompts(tokenizer: Any, records: Sequence[Record]) -> list[str]:
    """Each chat up to where the model answers. Raises `DataError`."""

    def render(record: Record) -> str:
        chat = Chat.from_record(record, answered=False)
        text, _ = _render(tokenizer, chat, generate=True)
        _unread_fields(tokenizer, chat, text, generate=True)
        return text

    return _within_time(render, records)


def render_answered(tokenizer: Any, records: Sequence[Record], loss: Loss) -> list[RenderedChat]:
    """Each chat with its answer, and where its loss counts.

    assistants: every assistant message of weight 1, with the token that ends its turn, as `assistant_only_loss` of TRL;
    last: the last of these; all: everything but assistant messages of weight 0. Raises `DataError`.
    """
    if not records:
        return []
    turn_end = TurnEnd.of(tokenizer)

    def render(record: Record) -> RenderedChat:
        chat = Chat.from_record(record, answered=True)
        text, marked = _render(tokenizer, chat)
        unread = _unread_fields(tokenizer, chat, text)
        answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        chosen = [index for index in answers if chat.has_loss[index] == (loss != "all")][-1 if loss == "last" else 0 :]
        if not marked:
            spans, length = _find_answers(tokenizer, chat, text, chosen, turn_end)
        elif len(marked) == len(answers):
            spans, length = [marked[answers.index(index)] for index in chosen], len(text)
        elif chosen == answers:
            spans, length = marked, len(text)
        else:
            raise DataError(
                f"{chat.source}: the tokenizer's chat template marks {len(marked)} generations in {len(answers)} "
                "assistant messages, so single ones cannot be left out; remove weights and set data.loss=assistants"
            )
        if loss == "all":
            spans = gaps_between(spans, 0, length)
        return RenderedChat(text[:length], tuple(spans), not marked and not turn_end.closing, unread)

    return _within_time(render, records)


def gaps_between(spans: Sequence[Span], start: int, end: int) -> list[Span]:
    """What spans, in order, leave of `start` to `end`, without empty ones."""
    edges = [start, *(edge for span in spans for edge in span), end]
    return [(before, after) for before, after in zip(edges[::2], edges[1::2], strict=True) if before < after]


@dataclass(frozen=True)
class TurnEnd:
    """What the chat template writes after an assistant's message."""

    text: str  # without white space at its end
    closing: str  # `text` up to the end-of-text token: it ends the last answer
    stop: str  # the first special token of `text`, which ends any answer; "" without one

    @classmethod
    def of(cls, tokenizer: Any) -> TurnEnd:
        """By an answer that is looked for in what the template writes."""
        turns = ({"role": "user", "content": PROBE.title()}, {"role": "assistant", "content": PROBE})
        (rendered,) = _within_time(lambda chat: _render(tokenizer, chat), [Chat(turns, (), (), "data.template")])
        text = rendered[0].rpartition(PROBE)[2].rstrip()
        before, end, _ = text.partition(tokenizer.eos_token or "\0")
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        return cls(text, before + end, next((token for token in tokens if token in special), ""))


def _find_answers(
    tokenizer: Any, chat: Chat, text: str, chosen: Sequence[int], turn_end: TurnEnd
) -> tuple[list[Span], int]:
    """(where these assistant messages are in the text, where its last answer ends), by rendering parts of the chat.

    An answer starts where the prompt for it ends, and includes the token that ends its turn.
    """
    length = len(text.rstrip())
    if turn_end.text and text[:length].endswith(turn_end.text):
        length += len(turn_end.closing) - len(turn_end.text)
    spans: list[Span] = []
    for index in reversed(chosen):
        prompt, _ = _render(tokenizer, replace(chat, messages=chat.messages[:index]), generate=True)
        if not text.startswith(prompt):
            # Later messages change how earlier ones are written: reasoning goes, tools move to the last question.
            probe = {**chat.messages[index], "content": PROBE}
            messages = (*chat.messages[:index], probe, *chat.messages[index + 1 :])
            prompt = _render(tokenizer, replace(chat, messages=messages))[0].partition(PROBE)[0]
        start, limit = len(prompt), spans[-1][0] if spans else length
        end = limit
        if index < len(chat.messages) - 1:
            stop = text.find(turn_end.stop, start, limit) if turn_end.stop else -1
            end = stop + len(turn_end.stop)
            if stop < 0:
                until, _ = _render(tokenizer, replace(chat, messages=chat.messages[: index + 1]))
                end = len(os.path.commonprefix([until, text]).rstrip())  # noqa: RUF071 - characters are meant
        if not text.startswith(prompt) or end <= start:
            raise DataError(
                f"{chat.source}: messages[{index}] cannot be found in what the tokenizer's chat template writes, which "
                "changes earlier messages once others follow; set data.loss=last, or mark generations in the template"
            )
        spans.append((start, end))
    return spans[::-1], length


def _unread_fields(tokenizer: Any, chat: Chat, text: str, *, generate: bool = False) -> tuple[str, ...]:
    """Fields of reasoning without which the text is the same; raises `DataError` if it is without tools."""
    fields = {key for message in chat.messages for key in message} | ({"tools"} if chat.tools else set())
    unread = []
    for field in (*TOOL_FIELDS, *REASONING_FIELDS):
        if field in fields:
            try:
                is_read = _render(tokenizer, chat.without(field), generate=generate)[0] != text
            except DataError:  # the answer of a tool needs its call
                is_read = True
            if not is_read:
                unread.append(field)
    if dropped := [field for field in unread if field in TOOL_FIELDS]:
        raise DataError(
            f"{chat.source}: the tokenizer's chat template does not write {' and '.join(dropped)}; take a model whose "
            "template knows tools, or remove these rows"
        )
    return tuple(unread)


def _within_time(render: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`render` of each record or chat; some at a time, as a template's loops may have no end."""
    results: list[R] = []
    for start in range(0, len(items), ROWS_RENDERED_AT_ONCE):
        batch = items[start : start + ROWS_RENDERED_AT_ONCE]
        try:
            results += call_within(RENDER_SECONDS, partial(list, map(render, batch)))
        except TimeoutError as endless:
            raise DataError(
                f"{batch[0].source}: the tokenizer's chat template does not come to an end ({endless}): correct it, or "
                "set data.template=raw"
            ) from endless
    return results


def _render(tokenizer: Any, chat: Chat, *, generate: bool = False) -> tuple[str, list[Span]]:
    """(the text of a chat, which characters of it the template marks as an assistant's); raises `DataError`."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.chat_template:
        raise DataError(
            f"{chat.source}: rows of messages (of data.template=chat all) need a chat template, and the tokenizer has "
            "none; set data.template=raw, or name a model tuned for chat"
        )

    def apply(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        tools = list(chat.tools) or None
        template = tokenizer.get_chat_template(None, tools)
        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        ((text,), marked) = render_jinja_template(
            [turns], tools, chat_template=template, add_generation_prompt=generate,
            return_assistant_tokens_mask=bool(GENERATION_MARK.search(template)), **tokenizer.special_tokens_map,
        )  # fmt: skip
        return text, marked[0] if marked else []

    try:
        try:
            return apply([_with_parsed_arguments(message) for message in chat.messages])
        except TypeError:  # a few templates take arguments as JSON text only
            return apply(chat.messages)
    except (TemplateError, ValueError, TypeError, ArithmeticError, RecursionError) as refused:
        reason = " ".join(str(refused).split())[:200]
        raise DataError(
            f"{chat.source}: the tokenizer's chat template refuses these messages ({reason}); "
            "correct the roles and their order, or set data.template=raw"
        ) from refused


def _with_parsed_arguments(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with arguments of tool calls as objects, as templates expect them, where they are JSON text."""

    def parsed(call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function", call)
        try:
            arguments = parse_json(function["arguments"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return call
        function = {**function, "arguments": arguments}
        return {**call, "function": function} if "function" in call else function

    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [parsed(call) for call in message["tool_calls"]]}
