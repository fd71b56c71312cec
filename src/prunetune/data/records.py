"""One example in the only form the rest of prunetune knows, and how a row of any source becomes one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prunetune.errors import DataError

RecordKind = Literal["completion", "chat", "text"]
FORMS = "prompt + completion (or prompt + choices + answer), messages, or text"


@dataclass(frozen=True)
class Record:
    """One example; made by `record_of`, which checks what the fields promise."""

    kind: RecordKind
    prompt: str = ""  # empty for chat and text
    completion: str = ""  # the answer; for text: all of it; for chat: the last assistant message
    choices: tuple[str, ...] = ()
    answer: int | None = None  # completion == choices[answer]
    messages: tuple[tuple[str, str], ...] = ()  # chat: (role, content) of what comes before the last assistant message
    task: str = ""
    id: str = ""
    group: str = ""  # records of one group never straddle splits
    source: str = ""  # "file:line"
    weight: float = 1.0  # of its source in a mixture

    def question_hash(self, *, with_choices: bool = True) -> str:
        """The question's identity, as SHA-256: case, white space and the order of choices do not count, nor whether a
        prompt is written as a user's only message. Without `choices`, what is asked alone."""
        alone = len(self.messages) == 1 and _normalise_text(self.messages[0][0]) == "user"
        return self._hash(self.messages[0][1:] if alone else self._question_texts(), choices=with_choices)

    def split_sort_key(self) -> str:
        """The key with a role before every message: carving sorts by it, so splits of a seed stay as they are."""
        return self._hash(self._question_texts(), choices=True)

    def _question_texts(self) -> Sequence[str]:
        if self.kind == "text":
            return [self.completion]
        return [part for message in self.messages for part in message] or [self.prompt]

    def _hash(self, question: Sequence[str], *, choices: bool) -> str:
        listed = sorted(_normalise_text(choice) for choice in self.choices) if choices else []
        return hashlib.sha256(json.dumps([[_normalise_text(part) for part in question], listed]).encode()).hexdigest()

    def content_json(self) -> str:
        """All that a model sees or is scored on, as one line; neither where it came from nor how much it weighs."""
        return json.dumps(
            [self.kind, self.prompt, self.completion, self.choices, self.answer, self.messages, self.task, self.group]
        )


def _normalise_text(text: str) -> str:
    return " ".join(text.casefold().split())


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
    """The record in one row of a data set; `id` and `task` hold where the row names none. Where it need not be
    `grouped`, it may lack the group's field; where it is not `typed`, 1 and "1" are the same to its source.

    Raises `DataError`, which begins with `source` ("file:line"), where the row lacks a field or has a wrong one.
    """
    try:
        if not isinstance(row, Mapping):
            raise DataError(f"row is {_short_repr(row)}; a row is an object with {FORMS}")
        # Tables fill what a row does not have with nulls.
        fields = {key: value for key, value in row.items() if value is not None}
        if not is_typed:
            _check_answer_unambiguous(fields)
        return Record(
            **_content(fields),
            task=_name(fields, "task", task),
            id=_name(fields, "id", id),
            group=_group(fields, group_field, needed=group_required),
            source=source,
            weight=weight,
        )
    except DataError as wrong:
        raise DataError(f"{source}: {wrong}") from None


def _content(fields: Mapping[str, Any]) -> dict[str, Any]:
    if "messages" in fields:
        return _chat(fields)
    if "prompt" in fields and ({"completion", "choices"} & set(fields) or "text" not in fields):
        return {"kind": "completion", "prompt": _text(fields["prompt"], "prompt"), **_answer_fields(fields)}
    if "text" in fields:
        return {"kind": "text", "completion": _text(fields["text"], "text")}
    found = _plain_line(", ".join(sorted(map(str, fields)))) or "no fields"
    raise DataError(f"row has {found}; it needs {FORMS}")


def _chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    value = fields["messages"]
    if not _is_list(value):
        raise DataError(f"messages must be a list of {{role, content}}, got {_short_repr(value)}")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(value)]
    if len(messages) < 2 or messages[-1][0] != "assistant":
        last = f"the last is from {messages[-1][0]!r}" if messages else "there is none"
        raise DataError(f"messages must hold a question and end with an assistant's answer; of {len(messages)} {last}")
    answered = _answer_fields({**fields, "completion": messages[-1][1]})
    return {"kind": "chat", "messages": tuple(messages[:-1]), **answered}


def _message(value: Any, name: str) -> tuple[str, str]:
    if not isinstance(value, Mapping) or not {"role", "content"} <= set(value):
        raise DataError(f"{name} must have role and content, got {_short_repr(value)}")
    return _text(value["role"], f"{name}.role"), _text(value["content"], f"{name}.content", empty=True)


def _answer_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `completion`, `choices` and `answer`: each follows from the others where it is not given."""
    if "choices" not in fields:
        if "completion" not in fields:
            raise DataError(f"row has prompt but no completion; it needs {FORMS}")
        return {"completion": _text(fields["completion"], "completion")}
    choices = _choices(fields["choices"])
    completion = _text(fields["completion"], "completion") if "completion" in fields else None
    if "answer" in fields:
        answer = _index(fields["answer"], choices)
        if completion is not None and completion != choices[answer]:
            raise DataError(
                f"completion is {_short_repr(completion)} but choices[{answer}] is {_short_repr(choices[answer])}; "
                "they must be equal: correct one, or leave completion out"
            )
    elif completion in choices:
        answer = choices.index(completion)
    else:
        got = "no completion" if completion is None else f"completion {_short_repr(completion)}, which is none of them"
        raise DataError(f"row has choices and {got}; add answer, the index of the right choice")
    return {"completion": choices[answer], "choices": choices, "answer": answer}


def _choices(value: Any) -> tuple[str, ...]:
    if not _is_list(value) or len(value) < 2:
        raise DataError(f"choices must be a list of two texts or more, got {_short_repr(value)}")
    choices = tuple(_text(choice, f"choices[{index}]") for index, choice in enumerate(value))
    twice = next((choice for index, choice in enumerate(choices) if choice in choices[:index]), None)
    if twice is not None:
        raise DataError(f"choices holds {_short_repr(twice)} twice; choices must differ")
    return choices


def _index(value: Any, choices: tuple[str, ...]) -> int:
    """An index, or the text of a choice; tables without types hold an index as digits."""
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    number = int(value) if isinstance(value, str) and _is_digits(value) else value
    if isinstance(number, int) and not isinstance(number, bool):
        if 0 <= number < len(choices):
            return number
        raise DataError(f"answer {_short_repr(value)} lies outside choices, whose indices are 0..{len(choices) - 1}")
    raise DataError(f"answer must be an index into choices, 0..{len(choices) - 1}, got {_short_repr(value)}")


def _check_answer_unambiguous(fields: Mapping[str, Any]) -> None:
    """Raises where digits are the text of one choice and the index of another, and nothing else says which is meant."""
    value: Any = fields.get("answer")
    choices: Any = fields.get("choices")
    told = not isinstance(value, str) or not _is_digits(value) or {"completion", "messages"} & set(fields)
    if told or not _is_list(choices) or value not in choices or int(value) >= len(choices):
        return
    if choices[int(value)] != value:
        raise DataError(
            f"answer {value} is the text of choices[{choices.index(value)}] and the index of choices[{int(value)}], "
            "and a table cannot say which; name the right choice's text in a column completion instead of answer, or "
            'write JSON lines, where 1 is an index and "1" a text'
        )


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9


def _name(fields: Mapping[str, Any], key: str, default: str) -> str:
    value = fields.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return (_text(value, key) if value != "" else default) if isinstance(value, str) else _text(value, key)


def _group(fields: Mapping[str, Any], key: str, *, needed: bool) -> str:
    group = _name(fields, key, "") if key else ""
    if key and needed and not group:
        raise DataError(f"row has no {key}, which data.group names; add it, or set data.group to a field of every row")
    return group


def _text(value: Any, name: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} must be text, got {_short_repr(value)}")
    if not empty and not value.strip():
        raise DataError(f"{name} is empty; fill it, or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds half of a surrogate pair, which is no character; write it as UTF-8") from None
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _short_repr(value: Any) -> str:
    try:
        return _plain_line(repr(value) if not isinstance(value, int) or value.bit_length() < 200 else "a huge number")
    except ValueError:  # an int inside has more digits than Python writes
        return f"a {type(value).__name__} with a huge number"


def _plain_line(text: str) -> str:
    # A row may hold a book, and the message is one line.
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
