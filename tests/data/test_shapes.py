"""Shapes of rows: each is told by its columns, read as its ecosystem means it, and what is not read is named."""

from __future__ import annotations

import csv
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from prunetune.config.recipe import ColumnsConfig, DataConfig
from prunetune.data.records import Record
from prunetune.data.shapes import NAMES, shape_row
from prunetune.data.sources import read_records, read_records_with_notes
from prunetune.errors import ConfigError, DataError
from support.data import write_lines

Q, A = "Which part?", "heart"
USER, ASSISTANT = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
CHAT = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"sign": 0}}}
CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ASSISTANT]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
PARTS = ["heart", "liver", "lung"]
LISTED = {"label": ["A", "B", "C"], "text": PARTS}


def pair(prompt: str = f"{Q}\n", completion: str = A) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def options(answer: int = 1, prompt: str = f"{Q}\n", choices: list[str] = PARTS) -> dict[str, Any]:
    return {"prompt": prompt, "choices": choices, "answer": answer}


# (row, canonical row, the line that says what it is)
SHAPES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # -- what needs no line: the names are those of the canonical row
    (pair("p", " c"), pair("p", " c"), "prompt/completion rows"),
    ({"text": "t"}, {"text": "t"}, "text rows"),
    ({"messages": CHAT}, {"messages": CHAT}, "messages rows"),
    (options(), options(), "choices rows"),
    # -- instructions and questions
    (
        {"instruction": Q, "input": "", "output": A},
        pair(),
        "alpaca rows; prompt from instruction + input, completion from output",
    ),
    (
        {"instruction": "Name it.", "input": Q, "output": A},
        pair(f"Name it.\n{Q}\n"),
        "alpaca rows; prompt from instruction + input, completion from output",
    ),
    (
        {"instruction": "Name it.", "context": Q, "response": A},
        pair(f"Name it.\n{Q}\n"),
        "alpaca rows; prompt from instruction + context, completion from response",
    ),
    (
        {"instruction": Q, "input": "", "output": A, "text": "### all of it", "prompt": "### all of it"},
        pair(),
        "alpaca rows; prompt from instruction + input, completion from output",
    ),
    ({"question": Q, "answer": A}, pair(), "question/answer rows; prompt from question, completion from answer"),
    ({"Question ": Q, "Answer": A}, pair(), "question/answer rows; prompt from question, completion from answer"),
    ({"instruction": Q, "input": math.nan, "output": A}, pair(), "alpaca rows"),
    ({"Instruction": "Name it.", "Input": Q, "Output": A}, pair(f"Name it.\n{Q}\n"), "alpaca rows"),
    ({"question": Q, "answer": 4.0}, pair(completion="4"), "question/answer rows; prompt from question, "),
    ({"question": f"{Q} ", "answer": A}, pair(f"{Q} "), "question/answer rows"),
    (
        {"context": "A body.", "question": Q, "answer": A},
        pair(f"A body.\n{Q}\n"),
        "question/answer rows; prompt from context + question, completion from answer",
    ),
    (
        {"problem": Q, "solution": "because", "answer": A},
        pair(completion="because"),
        "question/answer rows; prompt from problem, completion from solution",
    ),
    ({"query": Q, "response": A}, pair(), "question/answer rows; prompt from query, completion from response"),
    ({"prompt": Q, "response": A}, pair(), "prompt/response rows; completion from response"),
    ({"input": Q, "output": A}, pair(), "input/output rows; prompt from input, completion from output"),
    (
        {"instruction": Q, "input": "", "output": A, "system": "Be brief."},
        {"messages": [SYSTEM, *CHAT]},
        "alpaca rows; prompt from instruction + input, completion from output",
    ),
    (
        {"system_prompt": "Be brief.", "question": Q, "response": A},
        {"messages": [SYSTEM, *CHAT]},
        "question/answer rows; prompt from question, completion from response, system from system_prompt",
    ),
    # -- chats
    (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        {"messages": CHAT},
        "sharegpt rows; messages from conversations",
    ),
    (
        {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": "Be brief."},
        {"messages": [SYSTEM, *CHAT]},
        "sharegpt rows; messages from conversations",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "function_call", "value": '{"name": "look_up", "arguments": {"sign": 0}}'},
                {"from": "observation", "value": "0: heart"},
                {"from": "gpt", "value": A},
            ],
            "tools": json.dumps(TOOLS),
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "look_up", "arguments": {"sign": 0}}}
                    ],
                },
                {"role": "tool", "content": "0: heart"},
                ASSISTANT,
            ],
            "tools": TOOLS,
        },
        "sharegpt rows; messages from conversations",
    ),
    (
        {"messages": [USER, {"role": "tool_call", "content": json.dumps(CALL["function"])},
                      {"role": "tool_response", "content": "0: heart"}, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                      {"role": "tool", "content": "0: heart"}, ASSISTANT]},
        "messages rows",
    ),
    ({"messages": json.dumps(CHAT)}, {"messages": CHAT}, "messages rows"),
    ({"conversation": CHAT}, {"messages": CHAT}, "messages rows; messages from conversation"),
    (
        {"messages": CHAT, "choices": json.dumps(PARTS), "answer": 0},
        {"messages": CHAT, "choices": PARTS, "answer": 0},
        "messages rows",
    ),
    ({"messages": CHAT, "system": "Be brief."}, {"messages": [SYSTEM, *CHAT]}, "messages rows"),
    ({"messages": CHAT, "tools": TOOLS}, {"messages": CHAT, "tools": TOOLS}, "messages rows"),
    (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Which "}, {"type": "text", "text": "part?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": A}]},
        ]},
        {"messages": CHAT},
        "messages rows",
    ),
    ({"messages": json.dumps([json.dumps(USER), json.dumps(ASSISTANT)])}, {"messages": CHAT}, "messages rows"),
    ({"messages": [{"role": "User", "value": Q}, {"role": "Assistant", "value": A}]}, {"messages": CHAT}, "messages"),
    ({"messages": [{"role": "user", "content": {"type": "text", "text": Q}}, ASSISTANT]}, {"messages": CHAT}, "mess"),
    (
        {"conversations": [{"from": "user", "value": [{"type": "text", "text": Q}]}, {"from": "chatgpt", "value": A}]},
        {"messages": CHAT},
        "sharegpt rows",
    ),
    ({"messages": CALLED}, {"messages": CALLED}, "messages rows"),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}, ASSISTANT]},
        {"messages": CALLED},
        "messages rows",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}, ASSISTANT],
         "functions": [TOOLS[0]["function"]]},
        {"messages": CALLED, "tools": TOOLS},
        "messages rows; tools from functions",
    ),
    ({"messages": CHAT, "tools": [json.dumps(TOOLS[0])]}, {"messages": CHAT, "tools": TOOLS}, "messages rows"),
    ({"messages": CHAT, "tools": TOOLS[0]}, {"messages": CHAT, "tools": TOOLS}, "messages rows"),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL["function"]]}, ASSISTANT],
         "tools": json.dumps([TOOLS[0]["function"]])},
        {"messages": CALLED, "tools": TOOLS},
        "messages rows",
    ),
    ({"instruction": Q, "output": A, "tools": TOOLS}, {"messages": CHAT, "tools": TOOLS}, "alpaca rows; prompt from"),
    ({"prompt": [USER], "completion": [ASSISTANT]}, {"messages": CHAT}, "prompt/completion rows"),
    ({"prompt": USER, "completion": ASSISTANT}, {"messages": CHAT}, "prompt/completion rows"),
    (
        {"prompt": [{"from": "human", "value": Q}], "completion": [{"from": "gpt", "value": A}]},
        {"messages": CHAT},
        "prompt/completion rows",
    ),
    ({"question": [USER], "answer": A}, {"messages": CHAT}, "question/answer rows"),
    ({"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])}, {"messages": CHAT}, "prompt/completion"),
    ({"prompt": [SYSTEM, USER], "completion": A}, {"messages": [SYSTEM, *CHAT]}, "prompt/completion rows"),
    ({"prompt": Q, "completion": A, "system": "Be brief."}, {"messages": [SYSTEM, *CHAT]}, "prompt/completion rows"),
    # -- choices
    (
        {"question": Q, "opa": "heart", "opb": "liver", "opc": "lung", "cop": 1},
        options(),
        "choices rows; prompt from question, choices from opa + opb + opc, answer from cop",
    ),
    ({"question": Q, "opa": "heart", "opb": "liver", "opc": "lung", "cop": "1.0"}, options(), "choices rows"),
    ({"question": Q, "A": "heart", "B": "liver", "C": "lung", "answer": "B"}, options(), "choices rows"),
    ({"question": Q, "option_a": "B", "option_b": "A", "answer": "b"}, options(1, choices=["B", "A"]), "choices rows"),
    ({"question": Q, "opa": "heart", "opb": None, "opc": "lung", "cop": 2}, options(1, choices=["heart", "lung"]), ""),
    ({"question": Q, "choices": PARTS, "answer": 1}, options(), "choices rows; prompt from question"),
    ({"question": Q, "choices": json.dumps(PARTS), "answer": 1}, options(), "choices rows; prompt from question"),
    (
        {"question": Q, "choices": LISTED, "answerKey": "B"},
        options(),
        "choices rows; prompt from question, answer from answerkey",
    ),
    ({"question": Q, "choices": {"label": ["1", "2", "3"], "text": PARTS}, "answerKey": "2"}, options(), "choices"),
    ({"question": Q, "choices": {"label": ["1", "2", "3"], "text": PARTS}, "answerKey": 2.0}, options(), "choices"),
    ({"question": Q, "options": {"1": "heart", "2": "liver"}, "answer": 2.0}, options(1, choices=PARTS[:2]), "choices"),
    ({"question": Q, "choices": {"label": ["A ", "B ", "C "], "text": PARTS}, "answerKey": "B"}, options(), "choices"),
    ({"question": Q, "choices": PARTS, "correct_answer": "B"}, options("B"), "choices rows"),  # type: ignore[arg-type]
    (
        {"question": Q, "options": [{"key": "A", "value": "heart"}, {"key": "B", "value": "liver"}], "answer_idx": "B"},
        options(1, choices=PARTS[:2]),
        "choices rows; prompt from question, choices from options, answer from answer_idx",
    ),
    ({"question": Q, "opa": "a", "opb": "b", "opc": math.nan, "cop": 1.0}, options(1, choices=["a", "b"]), "choices"),
    (
        {"question": {"stem": Q, "choices": [{"text": t, "label": n} for t, n in zip(PARTS, "ABC", strict=True)]},
         "answerKey": "B"},
        options(),
        "choices rows",
    ),
    (
        {"question": Q, "options": dict(zip("ABC", PARTS, strict=True)), "answer_idx": "B", "answer": "liver"},
        options(),
        "choices rows; prompt from question, choices from options, answer from answer_idx",
    ),
    (
        {"article": "A body.", "question": Q, "options": PARTS, "answer": "B"},
        options("B", f"A body.\n{Q}\n"),  # type: ignore[arg-type]
        "choices rows; prompt from article + question, choices from options",
    ),
    ({"ctx": Q, "endings": PARTS, "label": "1"}, options("1"), "choices rows; prompt from ctx"),  # type: ignore[arg-type]
    # -- preferences
    (
        {"prompt": Q, "chosen": A, "rejected": "lung"},
        pair(),
        "preference rows (chosen is tuned on); completion from chosen",
    ),
    ({"prompt": Q, "chosen": CHAT, "rejected": [USER, USER]}, {"messages": CHAT}, "preference rows (chosen is"),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, {"messages": CHAT}, "preference rows"),
    ({"chosen": "Human: 1? Assistant: one", "rejected": "no"}, {"text": "Human: 1? Assistant: one"}, "preference rows"),
    ({"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": A}}, {"messages": CHAT}, ""),
]  # fmt: skip


@pytest.mark.parametrize(("row", "canonical", "line"), SHAPES)
def test_row_of_a_known_shape_is_read_as_its_canonical_row(
    row: dict[str, Any], canonical: dict[str, Any], line: str
) -> None:
    shaped = shape_row(row)
    assert shaped.fields == canonical
    assert shaped.shape.startswith(line)
    assert shape_row({**row, "id": "a", "task": "t"}).fields == {**canonical, "id": "a", "task": "t"}


@pytest.mark.parametrize(("row", "canonical", "line"), SHAPES)
def test_columns_that_no_shape_reads_are_named(row: dict[str, Any], canonical: dict[str, Any], line: str) -> None:
    unused = shape_row(row).unused
    assert shape_row({**row, "rating": 0, "note": "", "empty": None}).unused == (*unused, "rating")
    assert set(unused) <= {"text", "prompt", "rejected", "answer"}


def test_upper_case_group_keeps_its_name_and_its_value() -> None:
    row = {"Question": Q, "Answer": A, "Problem": "7"}
    shaped = shape_row(row, group_field="Problem")
    assert (shaped.fields, shaped.unused) == ({**pair(), "Problem": "7"}, ())
    assert "problem" in NAMES


def read(folder: Path, *rows: Any, split: Any = "train", **config: Any) -> tuple[tuple[Record, ...], str]:
    """The records of a file of rows, and the line on it."""
    file = write_lines(folder / "rows.jsonl", *rows)
    records, notes = read_records_with_notes([file], DataConfig(**config), split)
    return records, notes[file]


def test_line_on_a_source_counts_each_shape_and_each_unused_column(tmp_path: Path) -> None:
    rows = [
        {"instruction": Q, "input": "", "output": A, "label": False},
        {"instruction": Q, "output": A, "label": True, "messages.x": 1},
        {"messages": [USER, {**ASSISTANT, "rating": 5}]},
    ]
    _, line = read(tmp_path, *rows)
    assert line == (
        "1 alpaca rows; prompt from instruction + input, completion from output; 1 alpaca rows; prompt from "
        "instruction, completion from output; 1 messages rows; not used: label (2 rows), messages.x (1 rows), "
        "messages.rating (1 rows)"
    )


def test_empty_cells_of_a_table_do_not_change_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"instruction,input,output\nName it.,{Q},{A}\nName it.,,{A}\n", encoding="utf-8")
    records, notes = read_records_with_notes([str(file)], DataConfig(), "train")
    assert [record.prompt for record in records] == [f"Name it.\n{Q}\n", "Name it.\n"]
    assert notes == {str(file): "2 alpaca rows; prompt from instruction + input, completion from output"}


def test_plain_rows_are_read_without_a_word_and_labels_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    read_records([write_lines(tmp_path / "a.jsonl", pair("p", "c"))], DataConfig(), "train")
    assert caplog.messages == []
    labelled = write_lines(tmp_path / "b.jsonl", *({"text": f"t{n}", "label": n} for n in range(12)))
    read_records([labelled], DataConfig(), "valid")
    (line,) = caplog.messages
    assert line == (
        f"data.valid {labelled}: 12 text rows; not used: label (12 rows); an answer belongs into completion, or into "
        "choices and answer"
    )


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (PARTS, "B", 1), (PARTS, "b", 1), (PARTS, "(B)", 1), (PARTS, "B.", 1), (PARTS, 1.0, 1), (PARTS, "1.0", 1),
        (PARTS, "1", 1), (PARTS, " liver", 1), ([" heart", " liver"], "liver", 1), (["B", "A"], "A", 1),
        (PARTS, "B. liver", 1), (PARTS, "(b) liver", 1), (["0", "1", "2"], "2", 2), (["2", "1", "0"], "2", 0),
    ],
)  # fmt: skip
def test_answer_is_a_text_else_an_index_or_a_letter(
    choices: list[str], answer: Any, index: int, tmp_path: Path
) -> None:
    ((record,), _) = read(tmp_path, {"prompt": Q, "choices": choices, "answer": answer})
    assert (record.answer, record.completion) == (index, choices[index])


def test_completion_names_a_choice_but_for_white_space(tmp_path: Path) -> None:
    ((record,), _) = read(tmp_path, {"prompt": Q, "choices": [" heart", " liver"], "completion": "liver"})
    assert (record.answer, record.completion) == (1, " liver")


# -- data.columns ------------------------------------------------------------------------------------------------------

MAPPED: list[tuple[dict[str, str], dict[str, Any], dict[str, Any], str]] = [
    ({"prompt": "frage", "completion": "antwort"}, {"frage": Q, "antwort": A}, pair(), "from frage"),
    ({"prompt": "Die Frage"}, {"Die Frage": Q, "answer": A}, pair(), "prompt from Die Frage"),
    (
        {"prompt": "Q: {{ frage }}", "completion": " {{ antwort | upper }}"},
        {"frage": Q, "antwort": A},
        pair(f"Q: {Q}", " HEART"),
        "prompt from frage, completion from antwort",
    ),
    ({"prompt": "Q: {{ question }}A:"}, {"question": Q, "answer": A}, pair(f"Q: {Q}A:"), "prompt from question"),
    ({"completion": "short"}, {"question": Q, "answer": "long", "short": A}, pair(), "completion from short"),
    ({"text": "{{ title }}: {{ body }}"}, {"title": "a", "body": "b"}, {"text": "a: b"}, "text from body + title"),
    (
        {"choices": "[yes, no]", "answer": "key", "prompt": "question"},
        {"question": Q, "yes": "heart", "no": "liver", "key": "B"},
        {"prompt": f"{Q}\n", "choices": ["heart", "liver"], "answer": "B"},
        "choices from no + yes",
    ),
    ({"choices": "given.texts"}, {"question": Q, "given": {"texts": PARTS}, "answer": 1}, options(), "from given"),
    ({"messages": "dialog"}, {"dialog": [{"from": "human", "value": Q}, ASSISTANT]}, {"messages": CHAT}, "from dialog"),
    ({"system": "role"}, {"question": Q, "answer": A, "role": "Be brief."}, {"messages": [SYSTEM, *CHAT]}, "from role"),
]


@pytest.mark.parametrize(("columns", "row", "canonical", "line"), MAPPED)
def test_data_columns_say_what_columns_mean(
    columns: dict[str, str], row: dict[str, Any], canonical: dict[str, Any], line: str, tmp_path: Path
) -> None:
    expected = read(tmp_path, canonical)[0][0].content_json()
    records, said = read(tmp_path, {**row, "rating": 1}, columns=ColumnsConfig(**columns))
    assert records[0].content_json() == expected
    assert said.startswith("1 mapped rows; ")
    assert line in said
    assert "rating (1 rows)" in said
    assert ("answer (1 rows)" in said) == (columns == {"completion": "short"})


def test_rows_without_any_named_column_keep_their_shape(tmp_path: Path) -> None:
    columns = ColumnsConfig(prompt="frage", completion="antwort")
    _, said = read(tmp_path, {"frage": Q, "antwort": A}, {"text": "t"}, columns=columns)
    assert said == "1 mapped rows; prompt from frage, completion from antwort; 1 text rows"
    assert read(tmp_path, {"text": "t"}, columns=columns, split="guard")[1] == "1 text rows"
    with pytest.raises(DataError, match=r"names antwort, frage, and no row of data\.train has one"):
        read(tmp_path, {"text": "t"}, columns=columns)


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"prompt": "{{ frage"}, ConfigError, "data.columns.prompt is not a Jinja2 template"),
        ({"prompt": "{{ frage.x.y }}", "completion": "antwort"}, DataError, "data.columns.prompt"),
        (
            {"prompt": "frage", "completion": "reply"},
            DataError,
            "row has no reply, which data.columns.completion names",
        ),
    ],
)
def test_wrong_columns_are_refused_in_one_line(
    columns: dict[str, str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as refused:
        read(tmp_path, {"frage": Q, "antwort": A}, columns=ColumnsConfig(**columns))
    assert "\n" not in str(refused.value)


# -- bad rows ----------------------------------------------------------------------------------------------------------


def test_bad_rows_are_counted_and_the_first_few_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Any] = [pair(f"p{n}", "" if n in (3, 5, 8, 9) else "c") for n in range(12)]
    rows[5] = '{"prompt": "torn", '
    with pytest.raises(DataError) as refused:
        read(tmp_path, *rows)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}:4: completion is empty; fill it")
    assert "(4 of 12 rows cannot be used, also " in message
    assert "rows.jsonl:6: not valid JSON" in message
    assert "rows.jsonl:9: completion is empty" in message
    assert "rows.jsonl:10" not in message
    assert message.endswith("; data.bad_rows=drop leaves such rows out)")
    records, said = read(tmp_path, *rows, bad_rows="drop")
    assert [record.prompt for record in records] == [f"p{n}" for n in range(12) if n not in (3, 5, 8, 9)]
    assert said == "8 prompt/completion rows"
    assert "data.train leaves bad rows out: " in caplog.messages[0]
    assert "4 of 12 rows" in caplog.messages[0]


def test_dropping_all_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 2 rows cannot be used") as refused:
        read(tmp_path, {"text": ""}, {"txt": "b"}, bad_rows="drop")
    assert "data.bad_rows" not in str(refused.value)


BAD_ROWS = [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT]},
     "messages[0].content has a part of type image_url"),
    ({"messages": [{"role": "user", "content": [3]}, ASSISTANT]}, "messages[0].content has a part of type text"),
    ({"messages": "[{"}, "column messages: not valid JSON"),
    ({"conversations": "hello"}, "column conversations: not valid JSON"),
    ({"conversations": 7}, "messages must be a list"),
    ({"conversations": [{"from": "function_call", "value": "look up"}]}, "conversations[0]: not valid JSON"),
    ({"question": Q, "choices": LISTED, "answerKey": ""}, "answerkey is empty"),
    ({"question": Q, "choices": LISTED, "answerKey": "D"}, "answer 'D' lies outside choices, whose letters are A to C"),
    ({"question": Q, "opa": "a", "opb": "b", "cop": -1}, "cop -1 is none of the 2 choices, counted from 0"),
    ({"question": Q, "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 4}, "cop 4 is none of the 4 choices"),
    ({"question": Q, "opa": "a", "opb": None, "opc": "c", "cop": 1}, "cop 1 is none of the 2 choices"),
    ({"question": Q, "opa": "a", "opb": "b"}, "row has choices and no completion; add answer"),
    ({"question": Q, "answer": True}, "completion must be text, got True"),
    ({"question": Q, "answer": ["heart", "the heart"]}, "completion must be text, got ["),
    ({"instruction": "", "input": "", "output": A}, "prompt is empty"),
    ({"question": Q, "answer": A, "system": "s", "tools": "look_up"}, "column tools: not valid JSON"),
    ({"question": Q, "options": {"A": "x", "B": "x"}, "answer": "A"}, "choices has 'x' twice"),
    ({"prompt": [USER], "completion": [{"text": A}]}, "messages[1].content must be text"),
    ({"question": Q, "reply": A}, "it needs prompt + completion"),
    ({"prompt": Q, "choices": PARTS, "answer": "D"}, "'D' lies outside"),
    ({"prompt": Q, "choices": PARTS, "answer": "A. liver"}, "answer must be an index into choices"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_bad_row_of_a_known_shape_is_refused_in_one_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        read(tmp_path, row)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("answer", ["1", "1.0"])
def test_digits_in_lettered_columns_of_a_table_are_refused_where_they_are_ambiguous(
    answer: str, tmp_path: Path
) -> None:
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["question", "opa", "opb", "cop"], [Q, "1", "2", answer]])
    with pytest.raises(DataError, match=r"is the text of choices\[0\] and the index of choices\[1\]"):
        read_records([str(tmp_path / "rows.csv")], DataConfig(), "train")
