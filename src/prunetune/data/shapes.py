"""Shapes of rows: Alpaca, ShareGPT, lettered choices and others are told by their columns and made canonical.

A canonical row is {prompt, completion}, {prompt, choices, answer}, {messages, tools} or {text}, and `record_from_row`
checks what is in it. Columns are looked for in the order of the tables below, whatever their order in a file.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunetune.data.columns import ColumnMapping
from prunetune.errors import DataError
from prunetune.utils.untrusted import parse_json, short_repr, shorten

Fields = dict[str, Any]
Reads = dict[str, tuple[str, ...]]  # field of a canonical row -> the columns that it is from
# (name of the shape, the column that it is told by, the columns of its prompt, those of its answer: the first counts)
PAIRS = (
    ("prompt/completion", "prompt", ("prompt",), ("completion",)),
    ("alpaca", "instruction", ("instruction", "input", "context"), ("output", "response", "answer", "completion")),
    (
        "question/answer", "question", ("context", "passage", "question"),
        ("answer", "response", "output", "completion", "solution"),
    ),
    ("question/answer", "query", ("query",), ("response", "answer", "completion")),
    ("question/answer", "problem", ("problem",), ("solution", "response", "answer", "completion")),
    ("prompt/response", "prompt", ("prompt",), ("response", "output", "answer")),
    ("input/output", "input", ("input",), ("output", "response", "target", "completion")),
    ("input/output", "inputs", ("inputs",), ("targets", "outputs", "completion")),
)  # fmt: skip
CHATS = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
QUESTIONS = ("prompt", "question", "question_stem", "query", "problem", "ctx")
BEFORE_QUESTION = ("context", "passage", "article")
CHOICES = ("choices", "options", "endings")
ANSWERS = (
    "answer_idx",
    "answer_index",
    "answerkey",
    "answer_key",
    "cop",
    "correct_option",
    "answer",
    "label",
    "target",
)
LETTERED = re.compile(r"(op|opt|option_?|choice_?|)([a-j])", re.IGNORECASE)  # opa, option_b, C
COMMON = ("id", "task")  # read of rows of any shape
PROMPT_NAMES = {*CHATS, *QUESTIONS, *BEFORE_QUESTION, *(name for _, _, names, _ in PAIRS for name in names)}
ANSWER_NAMES = {"chosen", *ANSWERS, *(name for _, _, _, names in PAIRS for name in names)}
NAMES = {*PROMPT_NAMES, *ANSWER_NAMES, *CHOICES, *SYSTEM, *COMMON, "tools", "history", "rejected", "text"}
# The fields of a row's own that a field of a template or of data.columns replaces.
OVERRIDDEN = {
    "text": PROMPT_NAMES | ANSWER_NAMES | {*CHOICES},
    "messages": PROMPT_NAMES | ANSWER_NAMES | {*CHOICES, "text"},
    "prompt": PROMPT_NAMES,
    "completion": ANSWER_NAMES | {*CHOICES},
    "choices": {"completion", *CHOICES},
    "answer": {"completion", *ANSWERS},
}
ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "function": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
MESSAGE_FIELDS = {
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "weight", "train",
    "loss_weight",
}  # fmt: skip


@dataclass(frozen=True)
class ShapedRow:
    """A row made canonical, and what of it was read."""

    fields: Any
    shape: str = ""
    reads: Reads = field(default_factory=dict)
    unused: tuple[str, ...] = ()  # columns with a value that is not read


def shape_row(row: Any, mapping: ColumnMapping | None = None, *, group_field: str = "", source: str = "") -> ShapedRow:
    """The row in its canonical form; a row of no known shape stays as it is.

    `mapping` is for rows that have one of its columns. Raises `DataError`, which does not name the source.
    """
    if not isinstance(row, Mapping):
        return ShapedRow(row)
    columns = mapping.columns if mapping else frozenset[str]()
    mapping = mapping if not columns or columns & set(map(str, row)) else None
    own: Fields = {str(key): value for key, value in row.items() if value is not None}  # tables have nulls
    for key in [key for key in own if key not in NAMES and key != group_field and key not in columns]:
        plain = key.strip().lower()
        if plain in NAMES and plain not in own:
            own[plain] = own.pop(key)  # "Question", as people write it in a table
    rendered = mapping.render(own, source) if mapping else {}
    fields = {**{key: own[key] for key in own if key not in columns or not mapping}, **rendered}
    fields = without_overridden_fields(fields, rendered) | rendered
    for recognise in (_chat, _choices, _pair, _text):
        if (recognised := recognise(fields)) is None:
            continue
        shape, canonical, reads = recognised
        used = {name for names in reads.values() for name in names} - set(rendered)
        used |= {*COMMON, group_field, *(columns if mapping else ())}
        unused = [key for key, value in own.items() if key not in used and value not in ("", [], {})]
        turns = [turn for turn in canonical.get("messages") or () if isinstance(turn, Mapping)]
        unused += [
            f"messages.{key}"
            for key in dict.fromkeys(key for turn in turns for key in turn if key not in MESSAGE_FIELDS)
        ]
        is_written_out = reads.get("prompt") == ("prompt",) and reads.get("completion") in (("completion",), None)
        if mapping:
            is_written_out = mapping.texts.get("prompt", "") not in own
            shape, reads = "mapped", {key: tuple(sorted(mapping.names[key])) for key in rendered}
        if isinstance(canonical.get("prompt"), str) and not is_written_out:
            canonical["prompt"] = _with_line_end(
                canonical["prompt"], canonical.get("completion") or canonical["choices"]
            )
        kept = {key: own[key] for key in (*COMMON, group_field) if key in own}
        return ShapedRow(kept | canonical, shape, reads, tuple(unused))
    return ShapedRow(fields | ({group_field: own[group_field]} if group_field in own else {}))


def without_overridden_fields(fields: Mapping[str, Any], rendered: Collection[str]) -> Fields:
    """The row's own fields without those that a rendered field replaces."""
    replaced = set().union(*(OVERRIDDEN.get(key, set()) for key in rendered))
    return {key: value for key, value in fields.items() if key not in replaced}


def _chat(fields: Fields) -> tuple[str, Fields, Reads] | None:
    name = _first(CHATS, fields)
    if name is None or (name != "messages" and "prompt" in fields and {"completion", "choices"} & set(fields)):
        return None
    value = _from_json(fields[name], name)
    turns = _turns(value, name) if isinstance(value, list | tuple) else value
    reads: Reads = {"messages": (name,)}
    if isinstance(turns, list) and isinstance(fields.get("chosen"), Mapping):  # the answer of a preference
        turns, reads = [*turns, *_turns([fields["chosen"]], "chosen")], {"messages": (name, "chosen")}
    is_sharegpt = isinstance(value, list) and any(isinstance(turn, Mapping) and "from" in turn for turn in value)
    answers: Reads = {key: (key,) for key in ("choices", "answer") if key in fields and "choices" in fields}
    shape = "preference" if "chosen" in reads["messages"] else "sharegpt" if is_sharegpt else "messages"
    return _as_chat(shape, fields, turns, {**reads, **answers})


def _choices(fields: Fields) -> tuple[str, Fields, Reads] | None:
    if isinstance(fields.get("question"), Mapping):  # ARC as its authors wrote it
        fields = {**fields, **fields["question"], "question": fields["question"].get("stem")}
    question, name = _first(QUESTIONS, fields), _first(CHOICES, fields)
    if question is None:
        return None
    if name is not None:
        labels, texts = _labelled(_from_json(fields[name], name))
        columns: tuple[str, ...] = (name,)
    else:
        lettered = {match[2].lower(): key for key in fields if (match := LETTERED.fullmatch(key.strip()))}
        labels = sorted(lettered)
        columns = tuple(lettered[label] for label in labels)
        texts = [fields[column] for column in columns]
        if len(texts) < 2 or labels[0] != "a":
            return None
    if isinstance(texts, list) and not texts:
        return None
    answer = _first(ANSWERS, fields)
    before = [key for key in BEFORE_QUESTION if isinstance(fields.get(key), str) and question != "prompt"]
    reads: Reads = {"prompt": (*before, question), "choices": columns}
    canonical = {"prompt": _joined(fields, reads["prompt"]), "choices": texts}
    if answer is not None:
        canonical["answer"], reads["answer"] = _answer(fields[answer], answer, labels, texts, name is None), (answer,)
    if "completion" in fields:
        canonical["completion"], reads["completion"] = fields["completion"], ("completion",)
    return "choices", canonical, reads


def _pair(fields: Fields) -> tuple[str, Fields, Reads] | None:
    found = ((shape, key, prompts, _first((*answers, "chosen"), fields)) for shape, key, prompts, answers in PAIRS)
    matches = (pair for pair in found if pair[1] in fields and pair[3])
    shape, key, prompts, answer = next(matches, ("preference", "", (), _first(("chosen",), fields)))
    if answer is None:
        return None
    shape = "preference" if answer == "chosen" else shape
    names = tuple(name for name in prompts if name == key or isinstance(fields.get(name), str))
    reads: Reads = {"prompt": names, "completion": (answer,)} if names else {"text": (answer,)}
    asked, replied = (_as_turns(fields[name], name) if name else None for name in (key, answer))
    reply = fields[answer] if answer == "completion" else _as_text(fields[answer])
    if not asked and not replied and not (names and any(fields.get(name) for name in (*SYSTEM, "tools", "history"))):
        return shape, {"prompt": _joined(fields, names), "completion": reply} if names else {"text": reply}, reads
    if replied and replied[0].get("role") != "assistant":  # the whole conversation
        return _as_chat(shape, fields, replied, reads)
    if history := _from_json(fields.get("history", []), "history"):
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise DataError(f"history must be a list of pairs of texts, got {short_repr(history)}")
        reads["history"] = ("history",)
    earlier = [{"role": ("user", "assistant")[index], "content": pair[index]} for pair in history for index in (0, 1)]
    asked = asked or [{"role": "user", "content": _joined(fields, names)}]
    return _as_chat(shape, fields, [*earlier, *asked, *(replied or [{"role": "assistant", "content": reply}])], reads)


def _text(fields: Fields) -> tuple[str, Fields, Reads] | None:
    return ("text", {"text": fields["text"]}, {"text": ("text",)}) if "text" in fields else None


def _as_chat(shape: str, fields: Fields, turns: Any, reads: Reads) -> tuple[str, Fields, Reads]:
    """A row of messages, with the system prompt and the tools that have columns of their own."""
    canonical: Fields = {"messages": turns} | {key: fields[key] for key in ("choices", "answer") if key in reads}
    system = next((name for name in SYSTEM if isinstance(fields.get(name), str) and fields[name].strip()), None)
    roles = [turn.get("role") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    if system and roles and roles[0] not in ("system", "developer"):
        canonical["messages"] = [{"role": "system", "content": fields[system]}, *turns]
        reads = {**reads, "system": (system,)}
    if fields.get("tools"):
        canonical["tools"], reads = _from_json(fields["tools"], "tools"), {**reads, "tools": ("tools",)}
    return shape, canonical, reads


def _turns(turns: Any, name: str) -> list[Any]:
    """Messages as {role, content}: from/value renamed, parts of text joined. What is no message stays as it is."""
    result = []
    for index, value in enumerate(turns):
        if not isinstance(value, Mapping):
            result.append(value)
            continue
        turn = {key: entry for key, entry in value.items() if entry is not None or key == "content"}
        if "from" in turn and "role" not in turn:
            turn = {"role": turn.pop("from"), "content": turn.pop("value", turn.get("content")), **turn}
        role, content = turn.get("role"), turn.get("content")
        if role == "function_call":
            call = _from_json(content, f"{name}[{index}]")
            turn |= {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        elif isinstance(role, str):
            turn["role"] = ROLES.get(role.lower(), role)
        if isinstance(content, list | tuple):
            turn["content"] = "".join(_part(part, f"{name}[{index}].content") for part in content)
        result.append(turn)
    return result


def _part(part: Any, name: str) -> str:
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
    if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
        what = f"of type {shorten(str(kind))}" if kind != "text" else f"that is {short_repr(part)}"
        raise DataError(f"{name} has a part {what}; only parts of type text are read: remove it, or the row")
    return text


def _as_turns(value: Any, name: str) -> list[Any] | None:
    """Messages where a text might stand, also as JSON text; None for what are none."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = parse_json(value, nan=True, surrogates=True)
        except ValueError:
            return None
    value = [value] if isinstance(value, Mapping) else value
    is_chat = isinstance(value, list) and all(
        isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in value
    )
    return _turns(value, name) if is_chat and value else None


def _labelled(value: Any) -> tuple[list[str], Any]:
    """(labels, texts) of choices in any of their forms; no labels for a plain list."""
    if isinstance(value, Mapping) and {"label", "text"} <= set(value):
        return list(map(str, value["label"])), value["text"]
    if isinstance(value, Mapping):
        return list(map(str, value)), list(value.values())
    if isinstance(value, list) and value and all(isinstance(choice, Mapping) and "text" in choice for choice in value):
        labels = [str(choice.get("label", choice.get("key", ""))) for choice in value]
        return labels, [choice["text"] for choice in value]
    return [], value


def _answer(value: Any, name: str, labels: list[str], texts: list[Any], is_lettered: bool) -> Any:
    """The index of the choice with a label; what is no label stays. A number counts lettered columns from 0."""
    number = _whole(value)
    by_label = {label.strip().lower(): index for index, label in enumerate(labels)}
    label = str(value).strip().lower()
    if is_lettered and number is not None and value not in texts:
        label = string.ascii_lowercase[number] if 0 <= number < 26 else label
        if label not in by_label:
            raise DataError(
                f"{name} is {short_repr(value)}, which is none of the choices, counted from 0 (-1: no answer)"
            )
    if not label:
        raise DataError(f"{name} is empty: the row has no right answer; fill it, or remove the row")
    return by_label.get(label, value)


def _whole(value: Any) -> int | None:
    """A whole number, also as a float or as digits."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}(\.0)?", value):
        return int(float(value))
    return (
        int(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1 else None
    )


def _as_text(value: Any) -> Any:
    number = None if isinstance(value, str) else _whole(value)
    return (
        str(value if number is None else number)
        if isinstance(value, int | float) and not isinstance(value, bool)
        else value
    )


def _joined(fields: Fields, names: Collection[str]) -> Any:
    """The texts of columns as one; a single one that is no text stays, so that it is refused."""
    texts = [fields[name] for name in names]
    return texts[0] if len(texts) == 1 else "\n".join(text for text in texts if isinstance(text, str) and text.strip())


def _with_line_end(prompt: str, answer: Any) -> str:
    """The prompt, with a line end where nothing else would stand between it and its answer."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    is_apart = not prompt or prompt[-1].isspace() or (isinstance(first, str) and first[:1].isspace())
    return prompt if is_apart else f"{prompt}\n"


def _from_json(value: Any, name: str) -> Any:
    """The value of a column that holds lists or objects, which a table writes as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, nan=True, surrogates=True)
    except ValueError as broken:
        reason = broken.msg if isinstance(broken, json.JSONDecodeError) else broken
        raise DataError(f"column {name}: not valid JSON ({reason}); in a table it holds a JSON list") from None


def _first(names: Collection[str], fields: Fields) -> str | None:
    return next((name for name in names if name in fields), None)
