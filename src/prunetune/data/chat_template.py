"""Chats as the tokenizer's chat template writes them, and the characters of them that carry loss."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, Self, TypeVar

from prunetune.data.records import REASONING_FIELDS, Message, Record, make_all
from prunetune.errors import DataError
from prunetune.utils.deadline import RENDER_SECONDS, call_within
from prunetune.utils.untrusted import parse_json

T = TypeVar("T", "Chat", Record)
R = TypeVar("R")
Span = tuple[int, int]  # [start, end)
Loss = Literal["assistants", "last", "all"]
PROBE = "prunetune probe"  # an answer to look for in the output of a chat template
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
TOOL_FIELDS, OTHER_ROLES = ("tools", "tool_calls"), ("system", "developer", "tool")


@dataclass(frozen=True)
class Chat:
    """What a chat template reads."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    has_loss: tuple[bool, ...]  # by message; only an assistant's count
    source: str  # begins the message of a `DataError`

    @classmethod
    def from_record(cls, record: Record, *, answered: bool) -> Self:
        """The messages of a record up to its answer, or with it; a prompt is one user message."""
        messages = record.messages or (Message("user", record.prompt),)
        if answered:
            messages += (Message("assistant", record.completion, record.answer_fields),)
        tools = tuple(json.loads(record.tools)) if record.tools else ()
        turns = tuple(message.as_dict() for message in messages)
        return cls(turns, tools, tuple(message.has_loss for message in messages), record.source)

    def without(self, field: str) -> Self:
        """The chat without its tools, a field of its messages, or the messages of a role."""
        kept = (message for message in self.messages if message["role"] != field)
        messages = ({key: value for key, value in message.items() if key != field} for message in kept)
        return replace(self, messages=tuple(messages), tools=() if field == "tools" else self.tools)


@dataclass(frozen=True)
class RenderedChat:
    """The text of a chat."""

    prompt: str  # up to the last answer; where the template marks generations, all of it
    loss: list[Span]  # characters of `prompt` that carry loss, in order
    answer: str  # to be tokenised apart, as a model answers; it carries loss
    lacks_end: bool  # the template writes no end after the answer
    unread: tuple[str, ...]  # names, fields of reasoning and roles that the template does not write


@dataclass(frozen=True)
class TurnEnd:
    """What the chat template writes after an assistant's message."""

    text: str  # without white space at its end
    closing: str  # `text` up to the end-of-text token: it ends the last answer
    stop: str  # the first special token of `text`, which ends any answer; "" without one
    special: frozenset[str]  # all special tokens but the start token
    lead: str  # what stands between a prompt and an answer without reasoning: an empty thought, or ""

    @classmethod
    def of(cls, tokenizer: Any, source: str = "data.template") -> Self:
        """By an answer that is looked for in what the template writes; `source` begins the message of a `DataError`."""
        turns = ({"role": "user", "content": PROBE.title()}, {"role": "assistant", "content": PROBE})
        chat = Chat(turns, (), (), source)
        rendered, _ = _within_time(partial(_render, tokenizer), chat)
        prompt, _ = _render(tokenizer, replace(chat, messages=turns[:1]), generate=True)
        lead = rendered.removeprefix(prompt).partition(PROBE)[0] if rendered.startswith(prompt) else ""
        text = rendered.rpartition(PROBE)[2].rstrip()
        before, end, _ = text.partition(tokenizer.eos_token or "\0")
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        stop = next((token for token in tokens if token in special), "")
        return cls(text, before + end, stop, frozenset(special - {tokenizer.bos_token}), lead if lead.strip() else "")

    def cut(self, text: str) -> str:
        """The text of a chat up to the end of its last answer."""
        text = text.rstrip()
        return text.removesuffix(self.text) + self.closing if self.text and text.endswith(self.text) else text

    def find(self, text: str, start: int, limit: int) -> int:
        """Where the turn that is at `start` ends, 0 if no stop is found before `limit`."""
        at = text.find(self.stop, start, limit) if self.stop else -1
        return at + len(self.stop) if at >= 0 else 0


def render_prompts(tokenizer: Any, records: Sequence[Record]) -> list[str]:
    """Each chat up to where its answer starts. Raises `DataError`.

    That is behind an empty thought, if the template writes one before an answer without reasoning: the model is tuned
    on the answer there.
    """
    chats = [record for record in records if record.kind == "chat"]
    lead = TurnEnd.of(tokenizer, chats[0].source).lead if chats else ""

    def render(record: Record) -> str:
        chat = Chat.from_record(record, answered=False)
        text, _ = _render(tokenizer, chat, generate=True)
        _unread_fields(tokenizer, chat, text, generate=True)
        has_reasoning = "<think>" in record.completion or any(
            field in record.answer_fields for field in REASONING_FIELDS
        )
        return text if has_reasoning or record.kind != "chat" else text + lead

    return make_all(partial(_within_time, render), records)


def render_answered(tokenizer: Any, records: Sequence[Record], loss: Loss) -> list[RenderedChat]:
    """Each chat up to the end of its answer, and where its loss counts.

    assistants: every assistant message of weight 1 and the token that ends its turn, as `assistant_only_loss` of TRL;
    last: the last of these; all: everything but assistant messages of weight 0. Raises `DataError`.
    """
    if not records:
        return []
    turn_end = TurnEnd.of(tokenizer, records[0].source)

    def render(record: Record) -> RenderedChat:
        chat = Chat.from_record(record, answered=True)
        spans: list[Span]
        text, marked = _render(tokenizer, chat)
        unread = _unread_fields(tokenizer, chat, text)
        answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        chosen = [index for index in answers if chat.has_loss[index] == (loss != "all")][-1 if loss == "last" else 0 :]
        start = len(text)
        if marked and chosen == answers:
            spans = marked
        elif len(marked) == len(answers):
            spans = [marked[answers.index(index)] for index in chosen]
        else:
            text, spans = turn_end.cut(text), []
            start, _ = _find_answer(tokenizer, chat, text, answers[-1], len(text), turn_end)
            for index in reversed(chosen):
                if index != answers[-1]:
                    limit = spans[0][0] if spans else start
                    spans.insert(0, _find_answer(tokenizer, chat, text, index, limit, turn_end))
        spans = gaps_between(spans, 0, start) if loss == "all" else spans
        return RenderedChat(text[:start], spans, text[start:], not marked and not turn_end.closing, unread)

    return make_all(partial(_within_time, render), records)


def gaps_between(spans: Sequence[Span], start: int, end: int) -> list[Span]:
    """What spans, in order, leave of `start` to `end`, without empty ones."""
    edges = [start, *(edge for span in spans for edge in span), end]
    return [(before, after) for before, after in zip(edges[::2], edges[1::2], strict=True) if before < after]


def _find_answer(tokenizer: Any, chat: Chat, text: str, index: int, limit: int, turn_end: TurnEnd) -> Span:
    """Where an assistant message is in the text before `limit`: from the end of its prompt to the end of its turn.

    Raises `DataError` where that cannot be told.
    """
    is_last = index == len(chat.messages) - 1
    before, _ = _render(tokenizer, replace(chat, messages=chat.messages[:index]), generate=True)
    start, after = len(before), ""
    if not text.startswith(before) or not (is_last or turn_end.find(text, start, limit)):
        # Later messages change how earlier ones are written (reasoning goes, tools move to the last question), or only
        # the last one has an end: look for what is around the message, whatever it says.
        probe = {"role": "assistant", "content": PROBE}
        messages = (*chat.messages[:index], probe, *chat.messages[index + 1 :])
        try:
            around, _, after = turn_end.cut(_render(tokenizer, replace(chat, messages=messages))[0]).partition(PROBE)
        except DataError:  # the answer of a tool needs its call
            around = "\0"
        start = start if text.startswith(before) else len(around) if text.startswith(around) else limit
    end = limit if is_last else turn_end.find(text, start, limit)
    if not end and after and text.endswith(after):
        end = len(text) - len(after)
        end += max(len(token) for token in (*turn_end.special, turn_end.text, "") if after.startswith(token))
    if start >= end:
        raise DataError(
            f"{chat.source}: messages[{index}] cannot be found in what the tokenizer's chat template writes, which "
            "changes earlier messages once others follow; set data.loss=last, or mark generations in the template"
        )
    return start, end


def _unread_fields(tokenizer: Any, chat: Chat, text: str, *, generate: bool = False) -> tuple[str, ...]:
    """Fields and roles without which the text is the same; raises `DataError` if it is without tools."""
    fields = {key for message in chat.messages for key in (*message, message["role"])}
    fields |= {"tools"} if chat.tools else set()
    unread = []
    for field in (*TOOL_FIELDS, *REASONING_FIELDS, "name", *OTHER_ROLES):
        try:
            if field in fields and _render(tokenizer, chat.without(field), generate=generate)[0] == text:
                unread.append(field)
        except DataError:  # the answer of a tool needs its call
            continue
    if dropped := [field for field in unread if field in TOOL_FIELDS]:
        raise DataError(
            f"{chat.source}: the tokenizer's chat template does not write {' and '.join(dropped)}; write what they "
            "say into the messages (tools into a system message), take a model whose template knows tools, or remove "
            "these rows"
        )
    return tuple(unread)


def _within_time(render: Callable[[T], R], item: T) -> R:
    """`render` of a record or chat; raises `DataError` where a template's loops have no end."""
    try:
        return call_within(RENDER_SECONDS, partial(render, item))
    except TimeoutError as endless:
        raise DataError(
            f"{item.source}: the tokenizer's chat template does not come to an end ({endless}): correct it, or "
            "set data.template=raw"
        ) from endless


def _render(tokenizer: Any, chat: Chat, *, generate: bool = False) -> tuple[str, list[Span]]:
    """(the text of a chat, which characters of it the template marks as an assistant's); raises `DataError`."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.chat_template:
        raise DataError(
            f"{chat.source}: rows of messages (of data.template=chat all) need a chat template, and the tokenizer has "
            "none; set data.template=raw, or name a model tuned for chat"
        )
    tools = list(chat.tools) or None
    template = tokenizer.get_chat_template(None, tools)

    def apply(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
        ((text,), marked) = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=generate,
            return_assistant_tokens_mask=bool(GENERATION_MARK.search(template)), **tokenizer.special_tokens_map,
        )  # fmt: skip
        return text, marked[0] if marked else []

    end = tokenizer.eos_token or "\0"
    # Most templates want the arguments of a call as objects, DeepSeek's as text; many a template adds contents up.
    reasons = []
    for as_text, empty in product((False, True), (None, "")):
        turns = [_as_template_reads(message, as_text=as_text, empty=empty) for message in chat.messages]
        for turn in turns:  # no second end
            if turn["role"] == "assistant" and (content := turn.get("content") or "").rstrip().endswith(end):
                turn["content"] = content.rstrip().removesuffix(end)
        try:
            return apply(turns)
        except (TemplateError, ValueError, TypeError, ArithmeticError, RecursionError) as refused:
            reasons.append(" ".join(str(refused).split())[:200])
    raise DataError(
        f"{chat.source}: the tokenizer's chat template refuses these messages ({reasons[0]}); "
        "correct the roles and their order, or set data.template=raw",
        quoted=reasons[0],
    )


def _as_template_reads(message: Mapping[str, Any], *, as_text: bool, empty: str | None) -> dict[str, Any]:
    """The message, arguments of calls as objects or JSON text, reasoning under each name, without null fields."""

    def rewritten(call: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str) != as_text:
                arguments = json.dumps(arguments, ensure_ascii=False) if as_text else parse_json(arguments)
            return {**call, "function": {**call["function"], "arguments": arguments}}
        except (KeyError, TypeError, ValueError):
            return call

    turn = {**message, "content": empty if message["content"] is None else message["content"]}
    if "tool_calls" in turn:
        turn["tool_calls"] = list(map(rewritten, turn["tool_calls"]))
    reasoning = next((turn[key] for key in REASONING_FIELDS if turn.get(key) is not None), None)
    turn = {"thinking": reasoning, "reasoning_content": reasoning} | turn  # as 5.23 does, not 5.17
    return {key: value for key, value in turn.items() if value is not None}
