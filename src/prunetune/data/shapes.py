"""Shapes of rows: Alpaca, ShareGPT, lettered choices and others are told by their columns and made canonical.

A canonical row is {prompt, completion}, {prompt, choices, answer}, {messages, tools} or {text}, and `record_from_row`
checks what is in it. Columns are looked for in the order of the tables below, whatever their order in a file.
"""

import math
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from prunetune.data.records import LOSS_FIELDS
from prunetune.data.templates import ColumnMapping
from prunetune.errors import DataError
from prunetune.utils.untrusted import parse_json, short_repr, shorten

Fields = dict[str, Any]
Reads = dict[str, tuple[str, ...]]  # field of a canonical row -> the columns that it is from
Recognised = tuple[str, Fields, Reads]  # the first is the name of the shape
PAIRS = (  # shape, the column that it is told by, the columns of its prompt, those of its answer: the first counts
    ("prompt/completion", "prompt", "prompt", "completion"),
    ("alpaca", "instruction", "instruction input context", "output response answer completion chosen"),
    ("question/answer", "question", "context passage question", "answer response output completion solution chosen"),
    ("question/answer", "query", "query", "response answer completion"),
    ("question/answer", "problem", "problem", "solution response answer completion"),
    ("prompt/response", "prompt", "prompt", "response output answer chosen"),
    ("input/output", "input", "input", "output response target completion chosen"),
    ("input/output", "inputs", "inputs", "targets outputs completion"),
)
OPTIONAL = {"input", "context", "passage"}  # empty in some rows
CHATS = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
TOOLS = ("tools", "functions")  # the second is OpenAI's older form
QUESTIONS = ("prompt", "question", "question_stem", "query", "problem", "ctx")
BEFORE_QUESTION = ("context", "passage", "article")
CHOICES = ("choices", "options", "endings")
ANSWER_KEYS = ("answer_idx", "answerkey", "answer_key", "cop", "correct_option", "correct_answer")
ANSWERS = (*ANSWER_KEYS, "answer", "label", "target")
LETTERED = re.compile(r"(op|opt|option_?|choice_?|)([a-j])", re.IGNORECASE)  # opa, option_b, C
COMMON = ("id", "task")  # read of rows of any shape
PROMPT_NAMES = {*CHATS, *QUESTIONS, *BEFORE_QUESTION, *(name for pair in PAIRS for name in pair[2].split())}
ANSWER_NAMES = {"chosen", *ANSWERS, *(name for pair in PAIRS for name in pair[3].split())}
NAMES = {*PROMPT_NAMES, *ANSWER_NAMES, *CHOICES, *SYSTEM, *COMMON, *TOOLS, "rejected", "text"}
OVERRIDDEN = {  # the fields of a row's own that a field of a template or of data.columns replaces
    "text": PROMPT_NAMES | ANSWER_NAMES | {*CHOICES},
    "messages": PROMPT_NAMES | ANSWER_NAMES | {*CHOICES, "text"},
    "prompt": PROMPT_NAMES,
    "completion": ANSWER_NAMES | {*CHOICES},
    "choices": {"completion", *CHOICES},
    "answer": {"completion", *ANSWERS},
}
ROLES = {"system": "system"} | dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation", "tool_response"), "tool")
MESSAGE_FIELDS = {
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", *LOSS_FIELDS,
}  # fmt: skip


@dataclass(frozen=True)
class ShapedRow:
    """A row made canonical, and what of it was read."""

    fields: Any
    shape: str = ""  # such as "alpaca rows; prompt from instruction + input"
    unused: tuple[str, ...] = ()  # columns with a value that is not read


def shape_row(row: Any, mapping: ColumnMapping | None = None, *, group_field: str = "", source: str = "") -> ShapedRow:
    """The row in its canonical form; a row of no known shape stays as it is.

    `mapping` is for rows that have one of its columns. Raises `DataError`, which does not name the source.
    """
    if not isinstance(row, Mapping):
        return ShapedRow(row)
    columns = mapping.columns if mapping else frozenset[str]()
    own = {str(key): "" if value is None and key in OPTIONAL else value for key, value in row.items()}
    own = {key: value for key, value in own.items() if value is not None and value == value}  # null, NaN: empty cells
    for key in sorted(set(own) - {*NAMES, group_field, *columns}):
        if (plain := key.strip().lower()) in NAMES and plain not in own:
            own[plain] = own.pop(key)  # "Question", as people write it in a table
    is_mapped = mapping is not None and (not columns or bool(columns & set(map(str, row))))
    rendered = mapping.render(own, source) if mapping and is_mapped else {}
    fields = {key: value for key, value in own.items() if not is_mapped or key not in columns}
    fields = without_overridden_fields(fields, rendered) | rendered
    recognised = next(filter(None, (recognise(fields) for recognise in (_chat, _choices, _pair, _text))), None)
    kept = {key: own[key] for key in (*COMMON, group_field) if key in own}
    if recognised is None:
        return ShapedRow(fields | kept)
    shape, canonical, reads = recognised
    used = {name for names in reads.values() for name in names} - set(rendered)
    used |= {*kept, *(columns if is_mapped else ())}
    unused = [key for key, value in own.items() if key not in used and (value or isinstance(value, int | float))]
    messages = canonical.get("messages")
    turns = [turn for turn in messages if isinstance(turn, Mapping)] if isinstance(messages, list) else []
    unused += dict.fromkeys(f"messages.{key}" for turn in turns for key in turn if key not in MESSAGE_FIELDS)
    # What is written as prompt and completion, or by a template, says what stands between the two.
    is_apart = reads.get("prompt") == ("prompt",) and reads.get("completion") in (("completion",), None)
    if mapping and is_mapped:
        is_apart = mapping.texts["prompt"] not in own if "prompt" in rendered else is_apart
        shape, reads = "mapped", reads | {key: tuple(sorted(mapping.names[key])) for key in rendered}
    prompt, answer = canonical.get("prompt"), canonical.get("choices", canonical.get("completion"))
    first = answer[0] if isinstance(answer, list) and answer else answer
    is_spaced = isinstance(first, str) and first[:1].isspace()
    if isinstance(prompt, str) and prompt and not (is_apart or prompt[-1].isspace() or is_spaced):
        canonical["prompt"] = f"{prompt}\n"
    origins = ", ".join(f"{key} from {' + '.join(names)}" for key, names in reads.items() if names != (key,))
    choice = " (chosen is tuned on)" if shape == "preference" else ""
    return ShapedRow(kept | canonical, f"{shape} rows{choice}{origins and f'; {origins}'}", tuple(unused))


def without_overridden_fields(fields: Mapping[str, Any], rendered: Collection[str]) -> Fields:
    """The row's own fields without those that a rendered field replaces."""
    replaced = set().union(*(OVERRIDDEN.get(key, set()) for key in rendered))
    return {key: value for key, value in fields.items() if key not in replaced}


def _chat(fields: Fields) -> Recognised | None:
    name = _first(CHATS, fields)
    if name is None or (name != "messages" and "prompt" in fields and {"completion", "choices"} & set(fields)):
        return None
    turns, shape = _from_json(fields[name], name), "messages"
    columns: tuple[str, ...] = (name,)
    if isinstance(turns, list | tuple):
        shape = "sharegpt" if any(isinstance(turn, Mapping) and "from" in turn for turn in turns) else shape
        turns = _turns(turns, name)
        if isinstance(fields.get("chosen"), Mapping):  # the answer of a preference
            turns, columns, shape = [*turns, *_turns([fields["chosen"]], "chosen")], (name, "chosen"), "preference"
    answers = {key: (key,) for key in ("choices", "answer") if {key, "choices"} <= set(fields)}
    return _as_chat(shape, fields, turns, {"messages": columns, **answers})


def _choices(fields: Fields) -> Recognised | None:
    if isinstance(fields.get("question"), Mapping):  # ARC as its authors wrote it
        fields = {**fields, **fields["question"], "question": fields["question"].get("stem")}
    question, name = _first(QUESTIONS, fields), _first(CHOICES, fields)
    lettered = {match[2].lower(): key for key in fields if (match := LETTERED.fullmatch(key.strip()))}
    if question is None or (name is None and not (len(lettered) > 1 and {"a", "b"} & set(lettered))):
        return None
    labels, columns = sorted(lettered), tuple(lettered[label] for label in sorted(lettered))
    texts: Any = [fields[column] for column in columns]
    if name is not None:
        (labels, texts), columns = _labelled(_from_json(fields[name], name)), (name,)
    if isinstance(texts, list) and not texts:
        return None
    prompts = (*(key for key in BEFORE_QUESTION if fields.get(key) and question != "prompt"), question)
    canonical, reads = {"prompt": _joined(fields, prompts), "choices": texts}, {"prompt": prompts, "choices": columns}
    if "completion" in fields:
        canonical["completion"], reads["completion"] = fields["completion"], ("completion",)
    answer = _first(("answer",) if "completion" in fields else ANSWERS, fields)
    if answer is not None:
        reads["answer"] = (answer,)
        canonical["answer"] = _answer(fields[answer], answer, labels, texts, counts_columns=name is None)
    return "choices", canonical, reads


def _pair(fields: Fields) -> Recognised | None:
    known = ((shape, key, prompts.split(), _first(answers.split(), fields)) for shape, key, prompts, answers in PAIRS)
    pairs = [pair for pair in known if pair[1] in fields and pair[3]]
    shape, key, prompts, answer = next(iter(pairs), ("preference", "", [], _first(["chosen"], fields)))
    if answer is None:
        return None
    shape = "preference" if answer == "chosen" else shape
    names = tuple(name for name in prompts if name == key or isinstance(fields.get(name), str))
    reads: Reads = {"prompt": names, "completion": (answer,)} if names else {"text": (answer,)}
    reply = fields[answer] if answer == "completion" else _as_text(fields[answer])
    asked, replied = _as_turns(fields.get(key), key), _as_turns(reply, answer)
    if replied and replied[0].get("role") != "assistant":  # the whole conversation
        return _as_chat(shape, fields, replied, reads)
    if not asked and not replied and not (names and any(fields.get(name) for name in (*SYSTEM, *TOOLS))):
        return shape, {"prompt": _joined(fields, names), "completion": reply} if names else {"text": reply}, reads
    turns = [*(asked or [{"role": "user", "content": _joined(fields, names)}])]
    return _as_chat(shape, fields, turns + (replied or [{"role": "assistant", "content": reply}]), reads)


def _text(fields: Fields) -> Recognised | None:
    return ("text", {"text": fields["text"]}, {"text": ("text",)}) if "text" in fields else None


def _as_chat(shape: str, fields: Fields, turns: Any, reads: Mapping[str, tuple[str, ...]]) -> Recognised:
    """A row of messages, with the system prompt and the tools that have columns of their own."""
    canonical: Fields = {"messages": turns} | {key: fields[key] for key in ("choices", "answer") if key in reads}
    canonical |= {"choices": _from_json(fields["choices"], "choices")} if "choices" in reads else {}
    reads, system = dict(reads), next((name for name in SYSTEM if str(fields.get(name, "")).strip()), None)
    first = turns[0] if isinstance(turns, list) and turns else None
    if system and isinstance(first, Mapping) and first.get("role") not in ("system", "developer"):
        canonical["messages"] = [{"role": "system", "content": fields[system]}, *turns]
        reads["system"] = (system,)
    if column := next((name for name in TOOLS if fields.get(name)), None):
        tools = _from_json(fields[column], column)
        tools = [_function(tool, column) for tool in (tools if isinstance(tools, list) else [tools])]
        canonical["tools"], reads["tools"] = tools, (column,)
    return shape, canonical, reads


def _turns(turns: Collection[Any], name: str) -> list[Any]:
    """Messages as {role, content}: from/value renamed, parts of text joined. What is no message stays as it is."""
    result: list[Any] = []
    for value in turns:
        where = f"{name}[{len(result)}]"
        value = _from_json(value, where) if isinstance(value, str) and value.lstrip().startswith("{") else value
        turn = dict(value) if isinstance(value, Mapping) else {}
        renamed = (("role", "from"), ("content", "value"))
        turn = {key: turn.pop(old) for key, old in renamed if old in turn and key not in turn} | turn
        role, content = turn.get("role"), turn.get("content")
        if role in ("function_call", "tool_call"):
            turn |= {"role": "assistant", "content": "", "function_call": _from_json(content, where)}
        elif isinstance(role, str):
            turn["role"] = ROLES.get(role.strip().lower(), role)
        if called := turn.pop("function_call", None):  # OpenAI's older form of one call
            turn["tool_calls"] = [called]
        if isinstance(calls := _from_json(turn.get("tool_calls"), f"{where}.tool_calls"), list):
            turn["tool_calls"] = [_function(call, f"{where}.tool_calls") for call in calls]
        if isinstance(content, list | tuple | Mapping):
            parts = [content] if isinstance(content, Mapping) else content
            turn["content"] = "".join(_part(part, f"{where}.content") for part in parts)
        result.append(turn or value)
    return result


def _function(value: Any, name: str) -> Any:
    """A tool, or a call of one, as {type, function}; it may be bare or JSON text."""
    value = _from_json(value, name)
    is_bare = isinstance(value, Mapping) and "name" in value and "function" not in value
    return {"type": "function", "function": value} if is_bare else value


def _part(part: Any, name: str) -> str:
    part = {"text": part} if isinstance(part, str) else part if isinstance(part, Mapping) else {}
    kind, text = part.get("type", "text"), part.get("text")
    if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
        raise DataError(f"{name} has a part of type {shorten(str(kind))}; only parts with text are read: remove it")
    return text


def _as_turns(value: Any, name: str) -> list[Any] | None:
    """Messages where a text might stand, also as JSON text; None for what are none."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = parse_json(value, nan=True, surrogates=True, unique_keys=True)
        except ValueError:
            return None
    turns = [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []
    is_chat = all(isinstance(turn, Mapping) and {"role", "from"} & set(turn) for turn in turns)
    return _turns(turns, name) if turns and is_chat else None


def _labelled(value: Any) -> tuple[list[str], Any]:
    """(labels, texts) of choices in any of their forms; no labels for a plain list."""
    if isinstance(value, Mapping) and isinstance(value.get("label"), list) and "text" in value:
        return list(map(str, value["label"])), value["text"]
    if isinstance(value, Mapping):
        return list(map(str, value)), list(value.values())
    if isinstance(value, list) and all(isinstance(item, Mapping) and {"text", "value"} & {*item} for item in value):
        labels = [str(choice.get("label", choice.get("key", ""))) for choice in value]
        return labels, [choice.get("text", choice.get("value")) for choice in value]
    return [], value


def _answer(value: Any, name: str, labels: list[str], texts: Any, *, counts_columns: bool) -> Any:
    """The index of the choice with a label, or the value as it is; a number may count lettered columns, from 0."""
    by_label = {label.strip().lower(): index for index, label in enumerate(labels)}
    label, number = str(value).strip().lower(), _whole(value)
    label = label if number is None else str(number)  # pandas makes 2 a 2.0
    if counts_columns and number is not None and value not in texts and str(number) not in texts:
        label = string.ascii_lowercase[number] if 0 <= number < 26 else "none"
        if label not in by_label:
            raise DataError(f"{name} {short_repr(value)} is none of the {len(labels)} choices, counted from 0")
    if not label:
        raise DataError(f"{name} is empty: the row has no right answer; fill it, or remove the row")
    return by_label.get(label, value)


def _whole(value: Any) -> int | None:
    """A whole number, also as a float or as digits."""
    if isinstance(value, str):
        return int(float(value)) if re.fullmatch(r"-?\d{1,9}(\.0)?", value, re.ASCII) else None
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    return int(value) if is_whole else None


def _as_text(value: Any) -> Any:
    """A number as text; all else stays."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**63 or math.isnan(value):
        return value
    return str(value if (number := _whole(value)) is None else number)


def _joined(fields: Fields, names: Collection[str]) -> Any:
    """The texts of columns as one; a single one that is no text stays, so that it is refused."""
    values = [fields[name] for name in names]
    texts = [value for value in values if not isinstance(value, str) or value.strip()]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else values[-1]


def _from_json(value: Any, name: str) -> Any:
    """The value of a column that holds lists or objects, which a table writes as JSON text."""
    try:
        return parse_json(value, nan=True, surrogates=True, unique_keys=True) if isinstance(value, str) else value
    except ValueError as broken:
        reason = getattr(broken, "msg", broken)  # without line and column, which are those of the cell
        raise DataError(f"column {name}: not valid JSON ({reason}); in a table it holds a JSON list") from None


def _first(names: Collection[str], fields: Fields) -> str | None:
    return next((name for name in names if name in fields), None)
