"""Formats of data files: compression, encodings, separators, tables of any nesting; what cannot be read is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openpyxl import Workbook

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record
from prunetune.data.sources import read_records, read_rows
from prunetune.errors import PrunetuneError
from prunetune.utils.untrusted import parse_json
from support.data import pairs

ROWS = pairs(3)
LINES = "".join(f"{json.dumps(row)}\n" for row in ROWS).encode()
TABLE = b"prompt,completion\nWhere?, here\nWhy?, because\n"
MESSAGES = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data))


def read(folder: Path, name: str, content: bytes, **config: Any) -> tuple[Record, ...]:
    (folder / name).write_bytes(content)
    return read_records([name], DataConfig(root=str(folder), **config), "train")


def prompts(records: tuple[Record, ...]) -> list[str]:
    return [record.prompt for record in records]


@pytest.mark.parametrize(("ending", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstd)])
def test_compressed_text_is_read_and_keeps_its_task(
    ending: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    records = read(tmp_path, f"tickets.jsonl{ending}", compress(LINES))
    assert prompts(records) == [row["prompt"] for row in ROWS]
    assert records[0].task == "tickets"
    (tmp_path / "health").mkdir()
    assert read(tmp_path / "health", f"train.CSV{ending}", compress(TABLE))[0].task == "health"
    assert len(read(tmp_path, f"a.json{ending}", compress(json.dumps(ROWS).encode()))) == 3


def test_two_parts_of_gzip_in_one_file_are_both_read(tmp_path: Path) -> None:
    assert len(read(tmp_path, "a.jsonl.gz", gzip.compress(LINES, mtime=0) + gzip.compress(LINES))) == 6


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.jsonl", json.dumps(ROWS, indent=1)),
        ("a.json", LINES.decode()),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", f"\n{json.dumps({'train': ROWS}, indent=1)}"),
        ("a.ndjson", LINES.decode().replace("\n", "\r\n")),
        ("a.jsonl", LINES.decode().replace("\n", "\r")),
    ],
)
def test_json_is_lines_a_list_or_an_object_with_one_list(name: str, text: str, tmp_path: Path) -> None:
    assert prompts(read(tmp_path, name, text.encode())) == [row["prompt"] for row in ROWS]


def test_json_file_of_one_object_is_one_row(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "a.json", json.dumps({"messages": MESSAGES}, indent=1).encode())
    assert record.kind == "chat"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_usual_encodings_are_detected_and_a_guess_is_said(
    encoding: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "prompt,completion\r\nWo ist Köln?,Am Rhein – é\r\n".replace("–", "-" if encoding == "latin-1" else "–")
    if ending == ".jsonl":
        line = text.split("\r\n")[1]
        row = dict(zip(("prompt", "completion"), line.split(","), strict=True))
        text = json.dumps(row, ensure_ascii=False) + "\r\n"
    ((record),) = read(tmp_path, f"a{ending}", text.encode(encoding))
    assert (record.prompt, record.completion[:9]) == ("Wo ist Köln?", "Am Rhein ")
    assert record.completion.endswith("é")
    is_guess = encoding in ("latin-1", "cp1252")
    assert len([message for message in caplog.messages if "read as Windows-1252" in message]) == is_guess
    assert not is_guess or f"look at line {2 if ending == '.csv' else 1}" in caplog.text


def workbook(path: Path, *sheets: list[list[Any]]) -> Path:
    book = Workbook()
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"Sheet{number}")
        for row in rows:
            sheet.append(row)
    book.save(path)  # with the empty sheet that every new workbook has
    return path


def test_sheet_is_read_as_its_csv_would_be(tmp_path: Path) -> None:
    rows = [
        [],
        ["prompt", "choices", "answer", None],
        ["Where?", '["here", "there"]', 1],
        [],
        ["When?", '["x", "y"]', 0],
    ]
    workbook(tmp_path / "a.xlsx", rows)
    text = 'prompt,choices,answer,\nWhere?,"[""here"", ""there""]",1,\nWhen?,"[""x"", ""y""]",0,\n'
    (tmp_path / "a.csv").write_text(text)
    config = DataConfig(root=str(tmp_path))
    rows_of = {name: read_rows([name], config, "train") for name in ("a.xlsx", "a.csv")}
    assert [row.fields for row in rows_of["a.xlsx"]] == [row.fields for row in rows_of["a.csv"]]
    assert [row.source.rpartition(":")[2] for row in rows_of["a.xlsx"]] == ["3", "5"]


@pytest.mark.parametrize(
    ("sheets", "message"),
    [
        ([[["prompt", "prompt"], ["a", "b"]]], "two columns are called prompt; rename"),
        ([[["text"], ["a"]], [["text"], ["b"]]], "2 sheets hold rows (Sheet, Sheet0, Sheet1); save each as a file"),
        ([[]], "a.xlsx: empty"),
    ],
)
def test_sheets_that_hold_no_table_are_refused(sheets: Any, message: str, tmp_path: Path, say: Any) -> None:
    code, out, err = say("data", workbook(tmp_path / "a.xlsx", *sheets))
    assert (code, out) == (2, "")
    assert message in err


def edited(path: Path, *changes: tuple[str, str]) -> Path:
    """A workbook of one row under a header, with changes of its sheet's XML."""
    with ZipFile(workbook(path.with_suffix(".zip"), [["prompt", "completion"], ["a", "b"]])) as parts:
        files = {name: parts.read(name) for name in parts.namelist()}
    (name,) = [name for name in files if name.endswith("sheet2.xml")]
    with ZipFile(path, "w", ZIP_DEFLATED) as parts:
        for part, content in files.items():
            for old, new in changes if part == name else ():
                assert old.encode() in content
                content = content.replace(old.encode(), new.encode())
            parts.writestr(part, content)
    return path


LAST = (('<row r="2"', '<row r="1048576"'), ('"A2"', '"A1048576"'), ('"B2"', '"B1048576"'))
ENTITIES = "".join(f'<!ENTITY {name} "{20 * ("&" + inner + ";")}">' for inner, name in pairwise("abcdefgh"))
SHEETS = {
    "more rows than Excel has": (
        [('<row r="2"', '<row r="99999999"'), ('"A2"', '"A99999999"'), ('"B2"', '"B99999999"')],
        "more than 1,048,576 rows",
    ),
    "rows of all columns": ([("<sheetData>", "<sheetData>" + '<row><c r="XFD1"/></row>' * 2050)], "33,554,432 cells"),
    "entities": (
        [("<worksheet ", f'<!DOCTYPE l [<!ENTITY a "blow">{ENTITIES}]><worksheet '), ("<t>b<", "<t>&h;<")],
        "not readable as Excel",
    ),
    "a gibibyte of blanks": ([("</sheetData>", f"{' ' * (2**20)}</sheetData>")], "bytes once unpacked"),
}


@pytest.mark.parametrize("name", SHEETS)
def test_sheet_beyond_bounds_is_refused(name: str, tmp_path: Path, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "a gibibyte of blanks":
        monkeypatch.setattr("prunetune.data.formats.MAX_BYTES", 2**20)
    changes, message = SHEETS[name]
    code, out, err = say("data", edited(tmp_path / "a.xlsx", *changes))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize("size", ["A1:B2", "A1:XFD1048576", "A1"])
def test_rows_of_a_sheet_are_read_whatever_it_says_of_its_size(size: str, tmp_path: Path) -> None:
    file = edited(tmp_path / "a.xlsx", ("A1:B2", size), *LAST)
    (row,) = read_rows([str(file)], DataConfig(), "train")
    assert (row.fields, row.source) == ({"prompt": "a", "completion": "b"}, f"{file}:1048576")


def test_names_of_many_columns_and_fields_are_compared_in_linear_time(tmp_path: Path) -> None:
    """Compared with each other, a hundred thousand take hours."""
    names = [f"c{number}" for number in range(100_000)]
    (tmp_path / "a.csv").write_text(f"{','.join(names)}\n{','.join(names)}\n")
    (row,) = read_rows(["a.csv"], DataConfig(root=str(tmp_path)), "train")
    assert row.fields == dict(zip(names, names, strict=True))
    fields = ",".join(f'"{name}": 1' for name in [*names, names[-1]])
    with pytest.raises(ValueError, match="two fields are called c99999"):
        parse_json(f"{{{fields}}}", unique_keys=True)


def test_excel_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Any) -> None:
    monkeypatch.setattr("prunetune.utils.optional.is_installed", lambda name: name != "openpyxl")
    code, _, err = say("data", workbook(tmp_path / "a.xlsx", [["text"], ["a"]]))
    assert code == 2
    assert "pip install 'openpyxl>=" in err


def test_line_ends_of_windows_become_those_of_unix(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "a.csv", b'prompt,completion\r\n"a\r\nb",c\r\n')
    assert (record.prompt, record.completion) == ("a\nb", "c")


@pytest.mark.parametrize(
    "text",
    [
        'prompt;completion\n"Where? Here, or there";" here, there"\n',
        'sep=;\nprompt;completion\n"Where? Here, or there"; here, there\n',
        "prompt\tcompletion\nWhere? Here, or there\t here, there\n",
        '"prompt","completion"\n"Where? Here, or there"," here, there"\n',
        "prompt;completion;\nWhere? Here, or there; here, there;\n",
        "prompt|completion\nWhere? Here, or there| here, there\n",
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_separator_of_a_table_is_told_by_its_first_line(name: str, text: str, tmp_path: Path) -> None:
    (record,) = read(tmp_path, name, text.encode())
    assert (record.prompt, record.completion) == ("Where? Here, or there", " here, there")


def test_text_with_semicolons_in_a_table_of_one_column_stays_whole(tmp_path: Path) -> None:
    (record,) = read(tmp_path, "a.csv", b"text\nso; it is\n")
    assert record.completion == "so; it is"


NESTED = [
    {"messages": MESSAGES, "answer": None, "meta": {"tags": [{"a": 1}, None], "when": None}},
    {"messages": [*MESSAGES, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
]


def arrow(folder: Path, name: str, table: pa.Table) -> None:
    if name.endswith(".parquet"):
        pq.write_table(table, folder / name)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_arrow_tables_of_any_nesting_are_read(name: str, tmp_path: Path) -> None:
    arrow(tmp_path, name, pa.Table.from_pylist(NESTED))
    records = read_records([name], DataConfig(root=str(tmp_path)), "train")
    assert [record.completion for record in records] == ["Here.", "So."]


def test_fields_that_only_the_table_added_are_gone(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"sign": 0}}}
    rows = [
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"messages": [{"role": "tool", "content": "x", "name": "f"}], "tools": None},
    ]
    arrow(tmp_path, "a.parquet", pa.Table.from_pylist(rows))
    first, second = (row.fields for row in read_rows(["a.parquet"], DataConfig(root=str(tmp_path)), "train"))
    assert first == rows[0]
    assert second == {"messages": rows[1]["messages"]}


def test_messages_as_json_text_are_read_from_a_table(tmp_path: Path) -> None:
    arrow(tmp_path, "a.parquet", pa.table({"messages": [json.dumps(MESSAGES)]}))
    (record,) = read_records(["a.parquet"], DataConfig(root=str(tmp_path)), "train")
    assert (record.kind, record.completion) == ("chat", "Here.")


def test_whole_numbers_that_pandas_made_floats_are_indices(tmp_path: Path) -> None:
    table = pa.table(
        {"prompt": ["a?", "b?"], "choices": [["x", "y"]] * 2, "answer": [1.0, None], "completion": [None, "x"]}
    )
    arrow(tmp_path, "a.parquet", table)
    records = read_records(["a.parquet"], DataConfig(root=str(tmp_path)), "train")
    assert [record.answer for record in records] == [1, 0]


def test_ids_and_labels_that_pandas_made_floats_are_whole_numbers(tmp_path: Path) -> None:
    labelled = {"text": ["x", "y"], "label": ["1", "2"]}
    table = pa.table({"id": [7.0, None], "question": ["a?", "b?"], "choices": [labelled] * 2, "answerKey": [1.0, 2.0]})
    arrow(tmp_path, "a.parquet", table)
    records = read_records(["a.parquet"], DataConfig(root=str(tmp_path)), "train")
    assert [(record.id, record.answer) for record in records] == [("7", 0), ("a/a.parquet:2", 1)]


def two_columns_of_one_name() -> bytes:
    sink = pa.BufferOutputStream()
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["prompt", "completion", "completion"]), sink)
    return bytes(sink.getvalue())


# Twenty-odd bad inputs of the formats: (name, content, what the line says).
BAD = [
    ("a.csv", b"prompt,completion,completion\np,a,b\n", "a.csv: two columns are called completion; rename"),
    ("a.csv", b"prompt,completion, completion\np,a,b\n", "two columns are called completion"),
    ("a.tsv", b"text\ttext\na\tb\n", "two columns are called text"),
    ("a.jsonl", b'{"prompt": "p", "completion": "a", "completion": "b"}\n', "two fields are called completion"),
    ("a.json", b'[{"prompt": "p", "completion": "a", "completion": "b"}]', "two fields are called completion"),
    ("a.parquet", two_columns_of_one_name(), "two columns are called completion"),
    ("a.csv", b'messages\n"[{""role"": ""user"", ""content"": 1, ""content"": 2}]"\n', "fields are called cont"),
    ("a.csv", b'conversations\n"[{""from"": ""human"", ""from"": ""gpt""}]"\n', "two fields are called from"),
    ("a.json", b'[\n{"text": "a"},\n{"text": "b",}\n]', "a.json:3: not valid JSON"),
    ("a.json", b'[\n{"text": "a"},\n{"text": "b", "text": "c"}]', "two fields are called text, in {'text': 'c'}"),
    ("a.json.gz", gzip.compress(b'[\n{"text": "a"},\n{"text": "b",}\n]', mtime=0), "a.json.gz:3: not valid JSON"),
    ("a.jsonl", b'[\n{"text": "a"},\n{"text"', "a.jsonl:3: not valid JSON"),
    ("a.json", b'{"text": "a"}\n{"text"', "a.json:2: not valid JSON"),
    ("a.json", b'{"text": "a"', "a.json:1: not valid JSON"),
    ("a.json", b" \n", "a.json: empty"),
    ("a.json", b'"text"', "a.json:1: row is 'text'"),
    ("a.json", b'{"data": [1, 2]}', "row has data"),
    ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "a.jsonl.gz: not readable as .gz"),
    ("a.jsonl.gz", LINES, "a.jsonl.gz: not readable as .gz"),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), "a.jsonl.gz: empty"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd no", "a.jsonl.zst: not readable as .zst"),
    ("a.gz", gzip.compress(LINES, mtime=0), "a.gz: ending '.gz' is not read"),
    ("a.parquet.gz", b"", "a.parquet.gz: ending '.gz' is not read"),
    ("a.jsonl.xz", b"", "ending '.xz' is not read; known are .jsonl"),
    ("a.xls", b"", "ending '.xls' is not read; save the sheet as CSV or .xlsx"),
    ("a.XLS", b"", "ending '.XLS' is not read; save the sheet as CSV or .xlsx"),
    ("a.xlsx", b"PK", "a.xlsx: not readable as Excel"),
    ("a.jsonl", gzip.compress(LINES, mtime=0), "it is compressed: let its name end in .gz"),
    ("a.jsonl", b"\x00\x01\x02\xff\xff", "a.jsonl:1: not UTF-8"),
    ("a.jsonl", '{"text": "Köln"}\n'.encode() + b'{"text": "K\xf6ln"}\n', "a.jsonl:2: not UTF-8 (byte 0xf6)"),
    ("a.csv", "text\n漢字の文章\n".encode("shift-jis"), "a.csv:2: not UTF-8"),
    ("a.jsonl", b"\xff\xfe{\x00", "a.jsonl:1: not valid JSON"),
    ("a.jsonl", b"\xff\xfe{", "a.jsonl:1: not UTF-8"),
    ("a.csv", b'prompt;completion\n"Where?"s;here\n', "columns are separated by ';': quote texts"),
    ("a.tsv", b'prompt\tcompletion\n"Where?"s\there\n', "columns are separated by tabs: quote texts"),
    ("a.csv", b"prompt;completion\nWhere?;here;there\n", "a.csv:2: 3 cells under 2 column names"),
    ("a.arrow", b"ARROW1 no", "a.arrow: not readable as Arrow"),
    ("a.feather", b"", "a.feather: not readable as Arrow"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_file_ends_in_one_line_and_exit_code_2(
    name: str, content: bytes, message: str, tmp_path: Path, say: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / name).write_bytes(content)
    code, out, err = say("data", tmp_path / name)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rows_of_a_suite_are_all_readable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"prompt"')
    with pytest.raises(PrunetuneError, match=r"a\.jsonl:4: not valid JSON"):
        read_rows(["a.jsonl"], DataConfig(root=str(tmp_path)), "test")
