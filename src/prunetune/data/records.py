"""Records: one training or test example each, made from a row of any source with every field checked."""

import hashlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from prunetune.errors import DataError
from prunetune.utils.untrusted import parse_json, short_repr, shorten

T = TypeVar("T")
R = TypeVar("R")
RecordKind = Literal["completion", "chat", "text"]
FORMS = "prompt + completion (or prompt + choices + answer), messages, or text"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a message: what servers call it
LOSS_FIELDS = ("weight", "train", "loss_weight", "loss")  # of a message: OpenAI's, and what other trainers call it


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str  # calls of tools in it as lines of JSON
    fields: str = (
        ""  # JSON of what else a chat template may read: name, reasoning_content, tool_calls and their content
    )
    has_loss: bool = True  # of an assistant: whether it is tuned on

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates and servers take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.fields) if self.fields else {})}

    @property
    def texts(self) -> tuple[str, ...]:
        """What a model reads of it."""
        return (self.role, self.content, self.fields) if self.fields else (self.role, self.content)


@dataclass(frozen=True)
class Record:
    """One example of a data set. `record_from_row` makes it and checks the fields."""

    kind: RecordKind
    prompt: str = ""  # empty for chat and text
    completion: str = ""  # the answer; of a text all of it, of a chat the last assistant message
    choices: tuple[str, ...] = ()
    answer: int | None = None  # completion == choices[answer]
    messages: tuple[Message, ...] = ()  # of a chat, before the last assistant message that is tuned on
    answer_fields: str = ""  # `Message.fields` of that one
    tools: str = ""  # JSON list of the tools that a chat may call
    task: str = ""
    id: str = ""
    group: str = ""  # records of one group are always in the same split
    source: str = ""  # "file:line"
    weight: float = 1.0  # how often it appears in an epoch, from the weight of its source

    def question_hash(self, *, with_choices: bool = True) -> str:
        """SHA-256 of the question and its choices, the same for records that ask the same.

        Case, white space and the order of choices are ignored, and a chat of one user message equals a prompt.
        """
        single_user_message = len(self.messages) == 1 and _normalise_text(self.messages[0].role) == "user"
        texts = self._question_texts()
        return self._hash(texts[1:] if single_user_message else texts, with_choices=with_choices)

    def earlier_question_hashes(self) -> list[str]:
        """`question_hash` of the question before each earlier assistant message that is tuned on."""
        return [
            replace(self, messages=self.messages[:index], choices=()).question_hash()
            for index, message in enumerate(self.messages)
            if index and message.role == "assistant" and message.has_loss
        ]

    def split_sort_key(self) -> str:
        """SHA-256 of the question, its choices and the roles of messages; splitting sorts by it."""
        return self._hash(self._question_texts(), with_choices=True)

    def _question_texts(self) -> Sequence[str]:
        if self.kind == "text":
            return [self.completion]
        texts = [text for message in self.messages for text in message.texts] or [self.prompt]
        return [*texts, self.tools] if self.tools else texts

    def _hash(self, texts: Sequence[str], *, with_choices: bool) -> str:
        choices = sorted(_normalise_text(choice) for choice in self.choices) if with_choices else []
        return hashlib.sha256(json.dumps([[_normalise_text(text) for text in texts], choices]).encode()).hexdigest()

    def content_json(self) -> str:
        """All that a model sees or is scored on as a line of JSON: without id, source and weight."""
        answer = (self.completion, self.choices, self.answer)
        messages = [[*message.texts, *([] if message.has_loss else [False])] for message in self.messages]
        calls = [self.answer_fields, self.tools] if self.answer_fields or self.tools else []
        return json.dumps([self.kind, self.prompt, *answer, messages, self.task, self.group, *calls])


def _normalise_text(text: str) -> str:
    return " ".join(text.casefold().split())


def unusable_rows(bad: Sequence[DataError], total: int, advice: str = "") -> DataError:
    """One error for all bad rows: how many there are, and what is wrong with the first three."""

    def text(reasons: Sequence[str]) -> str:
        others = "; ".join(shorten(reason, 160) for reason in reasons[1:3])
        count = f"{len(bad):,} of {total:,} rows cannot be used"
        return f"{reasons[0]} ({count}{others and f', also {others}'}{advice})"

    error = DataError(text(list(map(str, bad))))
    error.unquoted = text([wrong.unquoted for wrong in bad])
    return error


def make_all(make: Callable[[T], R], rows: Sequence[T]) -> list[R]:
    """`make` of each row; raises one `DataError` for all rows that it refuses, or at once for one without an end."""
    results, bad = [], []
    for row in rows:
        try:
            results.append(make(row))
        except DataError as wrong:
            bad.append(wrong)
            if isinstance(wrong.__cause__, TimeoutError):
                break
    if bad:
        raise unusable_rows(bad, len(rows)) if bad[1:] else bad[0]
    return results


def record_from_row(
    row: Any,
    *,
    source: str,
    id: str = "",
    task: str = "",
    weight: float = 1.0,
    group_field: str = "",
    group_required: bool = True,
    is_typed: bool = True,
) -> Record:
    """The record in one row of a data set; `id` and `task` are used if the row has none.

    Without `group_required`, the row may lack `group_field`. Without `is_typed`, its source cannot tell 1 from "1".
    Raises `DataError`, which begins with `source` ("file:line"), if the row lacks a field or has a wrong one.
    """
    try:
        if not isinstance(row, Mapping):
            raise DataError(f"row is {short_repr(row)}; a row is an object with {FORMS}")
        # Tables have nulls where a row has no value.
        fields = {key: value for key, value in row.items() if value is not None}
        if not is_typed:
            _check_answer_unambiguous(fields)
        group = _name(fields, group_field, "") if group_field else ""
        if group_field and group_required and not group:
            advice = "add it, or set data.group to a field of every row"
            raise DataError(f"row has no {group_field}, which data.group names; {advice}")
        return Record(
            **_content(fields),
            task=_name(fields, "task", task),
            id=_name(fields, "id", id),
            group=group,
            source=source,
            weight=weight,
        )
    except DataError as wrong:
        raise DataError(f"{source}: {wrong}", quoted=str(wrong)) from None


def _content(fields: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in fields:
        return _chat(fields)
    if "prompt" in fields and ({"completion", "choices"} & set(fields) or "text" not in fields):
        return {"kind": "completion", "prompt": _text(fields["prompt"], "prompt"), **_answer_fields(fields)}
    if "text" in fields:
        return {"kind": "text", "completion": _text(fields["text"], "text")}
    names = shorten(", ".join(sorted(map(str, fields)))) or "no fields"
    raise DataError(f"row has {names}; it needs {FORMS}, another known shape (docs/guides/data.md), or data.columns")


def _chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    value = fields["messages"]
    if not _is_list(value):
        raise DataError(f"messages must be a list of {{role, content}}, got {short_repr(value)}")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    if len(messages) < 2 or messages[-1].role != "assistant":
        last = f"the last is from {messages[-1].role!r}" if messages else "there is none"
        raise DataError(f"messages must hold a question and end with an assistant's answer; of {len(messages)} {last}")
    # What follows the last message with loss changes neither loss nor score.
    targets = [index for index, message in enumerate(messages) if message.role == "assistant" and message.has_loss]
    if not targets or targets[-1] == 0:
        raise DataError("no assistant message counts (weight is 0); give one weight 1, or remove the row")
    answer = messages[targets[-1]]
    return {
        "kind": "chat",
        "messages": tuple(messages[: targets[-1]]),
        "answer_fields": answer.fields,
        "tools": _tools(fields.get("tools")),
        **_answer_fields({**fields, "completion": answer.content}),
    }


def _message(value: Any, name: str) -> Message:
    """The message in one entry of `messages`; only a call of tools may lack its content."""
    if not isinstance(value, Mapping) or "role" not in value:
        raise DataError(f"{name} must have role and content, got {short_repr(value)}")
    others = {key: item for key, item in value.items() if item is not None and key not in LOSS_FIELDS}
    role, content, calls = others.pop("role", None), others.pop("content", None), others.get("tool_calls")
    if calls is not None and not (_is_list(calls) and all(isinstance(call, Mapping) for call in calls)):
        raise DataError(f"{name}.tool_calls must be a list of objects, got {short_repr(calls)}")
    if not calls:
        others.pop("tool_calls", None)  # tables fill an empty one in
    if "content" not in value and not calls:
        raise DataError(f"{name} must have role and content, got {short_repr(value)}")
    text = _text("" if content is None and calls else content, f"{name}.content", empty=True)
    if calls:
        others["content"] = content
        calls = [json.dumps(call.get("function", call), default=str, ensure_ascii=False) for call in calls]
        text = "\n".join([text, *calls] if text else calls)
    weights = {key: value[key] for key in LOSS_FIELDS if value.get(key) is not None}
    for key, weight in weights.items():
        if weight not in (0, 1):
            raise DataError(f"{name}.{key} is {short_repr(weight)}; a message counts (1) or does not (0)")
    fields = _text(json.dumps(others, default=str, ensure_ascii=False), name) if others else ""
    return Message(_text(role, f"{name}.role"), text, fields, has_loss=all(weights.values()))


def _tools(value: Any) -> str:
    """The tools of a row, a list of JSON schemas or the JSON of one, as JSON; "" without any."""
    try:
        tools = parse_json(value) if isinstance(value, str) and value.strip() else value or []
    except ValueError as broken:
        raise DataError(f"tools is no JSON list ({broken}); write a list of function schemas") from None
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools must be a list of function schemas, got {short_repr(value)}")
    return _text(json.dumps(tools, default=str, ensure_ascii=False), "tools") if tools else ""


def _answer_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields completion, choices and answer of a record; completion and answer follow from each other."""
    if "choices" not in fields:
        if "completion" not in fields:
            raise DataError(f"row has prompt but no completion; it needs {FORMS}")
        return {"completion": _text(fields["completion"], "completion")}
    choices = _choices(fields["choices"])
    completion = _text(fields["completion"], "completion") if "completion" in fields else None
    if "answer" in fields:
        answer = _index(fields["answer"], choices)
        if completion is not None and completion.strip() != choices[answer].strip():
            raise DataError(
                f"completion is {short_repr(completion)} but choices[{answer}] is {short_repr(choices[answer])}; "
                "they must be equal: correct one, or leave completion out"
            )
    elif completion is not None and (same := _same_text(completion, choices)) is not None:
        answer = same
    else:
        got = "no completion" if completion is None else f"completion {short_repr(completion)}, which is none of them"
        raise DataError(f"row has choices and {got}; add answer, the index of the right choice")
    return {"completion": choices[answer], "choices": choices, "answer": answer}


def _choices(value: Any) -> tuple[str, ...]:
    if not _is_list(value) or len(value) < 2:
        raise DataError(f"choices must be a list of two texts or more, got {short_repr(value)}")
    choices = tuple(_text(choice, f"choices[{index}]") for index, choice in enumerate(value))
    repeated = next((choice for index, choice in enumerate(choices) if choice in choices[:index]), None)
    if repeated is not None:
        raise DataError(f"choices has {short_repr(repeated)} twice; choices must differ")
    return choices


def _index(value: Any, choices: tuple[str, ...]) -> int:
    """The index of the answer, given as the text of a choice, as an index in any type or digits, or as a letter."""
    if isinstance(value, str):
        if (same := _same_text(value, choices)) is not None:
            return same
        text = value.strip()
        named = re.fullmatch(r"\(?([A-Za-z])[).:]+\s*(\S.*)", text)  # "B. liver"
        if named and _same_text(named[2], choices) == (number := string.ascii_uppercase.index(named[1].upper())):
            return number
        if re.fullmatch(r"\d{1,8}(\.0)?", text, re.ASCII):
            value = int(float(text))
        elif len(letter := text.strip("().:").upper()) == 1 and letter in string.ascii_uppercase:
            if (number := string.ascii_uppercase.index(letter)) < len(choices):
                return number
            last = string.ascii_uppercase[min(len(choices), 26) - 1]
            raise DataError(f"answer {short_repr(value)} lies outside choices, whose letters are A to {last}")
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(number, int) and not isinstance(number, bool):
        if 0 <= number < len(choices):
            return number
        raise DataError(f"answer {short_repr(value)} lies outside choices, whose indices are 0..{len(choices) - 1}")
    raise DataError(
        f"answer must be an index into choices, 0..{len(choices) - 1}, a letter or the text of one, "
        f"got {short_repr(value)}; correct it, or remove the row"
    )


def _same_text(text: str, choices: tuple[str, ...]) -> int | None:
    """The index of the choice that has this text, or the only one that has it but for white space around it."""
    if text in choices:
        return choices.index(text)
    same = [index for index, choice in enumerate(choices) if choice.strip() == text.strip()]
    return same[0] if len(same) == 1 else None


def _check_answer_unambiguous(fields: Mapping[str, Any]) -> None:
    """Raises `DataError` if digits are the text of one choice and the index of another, and no completion decides."""
    value: Any = fields.get("answer")
    choices: Any = fields.get("choices")
    digits = re.fullmatch(r"(\d{1,8})(\.0)?", value, re.ASCII) if isinstance(value, str) else None
    if not digits or {"completion", "messages"} & set(fields) or not _is_list(choices) or digits[1] not in choices:
        return
    if int(digits[1]) < len(choices) and choices[int(digits[1])] != digits[1]:
        raise DataError(
            f"answer {value} is the text of choices[{choices.index(digits[1])}] and the index of "
            f"choices[{int(digits[1])}], and a table cannot say which; name the right choice's text in a column "
            'completion instead of answer, or write JSON lines, where 1 is an index and "1" a text'
        )


def _name(fields: Mapping[str, Any], key: str, default: str) -> str:
    value = fields.get(key, default)
    value = int(value) if isinstance(value, float) and value.is_integer() else value  # pandas makes 2 a 2.0
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return (_text(value, key) if value != "" else default) if isinstance(value, str) else _text(value, key)


def _text(value: Any, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, got {short_repr(value)}")
    if not empty and not value.strip():
        raise DataError(f"{name} is empty; fill it, or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} has half of a surrogate pair, which is no character; write it as UTF-8") from None
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
