"""What `report.samples` and `report.redact` let through: texts, errors, and patterns that are refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from prunetune.config.recipe import DataConfig, from_mapping
from prunetune.data.records import Record
from prunetune.data.sources import read_records
from prunetune.data.splits import load_splits
from prunetune.errors import ConfigError, DataError, LimitBroken
from prunetune.utils import redaction as redaction_module
from prunetune.utils.redaction import SHOW_ALL, Redaction
from support.data import write_lines

HIDE = Redaction(samples=False)
PERSON = "Jane Roe"


def test_texts_are_shown_by_default_redacted_by_patterns_and_hidden_without_samples() -> None:
    text = "Jane Roe, 078-05-1120"
    assert SHOW_ALL.text(text) == text
    assert Redaction(patterns=(r"\d{3}-\d{2}-\d{4}", "(?i)jane")).text(text) == "[redacted] Roe, [redacted]"
    assert HIDE.text(text) == Redaction(False, ("Jane",)).text(text) == "[hidden]"
    assert HIDE.text("") == ""


def test_recipe_says_what_is_shown() -> None:
    assert from_mapping({}).report.redaction == SHOW_ALL
    for off in (False, "off"):
        assert from_mapping({"report": {"samples": off}}).report.redaction == HIDE
    assert from_mapping({"report": {"samples": True, "redact": "a+"}}).report.redaction == Redaction(True, ("a+",))


def test_text_on_which_a_pattern_takes_too_long_is_replaced_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction_module, "MATCH_SECONDS", 0.05)
    started = time.monotonic()
    assert Redaction(patterns=(r"(.*a){30}c",)).text("aaaa " * 500) == "[redacted]"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("pattern", ["(", "a*", "", "a" * 1001, 5, None, "(?P<n>a)(?P<n", "a{9999999999}|b**+"])
def test_pattern_that_is_none_or_matches_the_empty_text_is_refused(pattern: Any) -> None:
    with pytest.raises(ConfigError, match=r"report\.redact"):
        from_mapping({"report": {"redact": [pattern]}})


def test_error_says_all_or_nothing_of_what_it_quotes() -> None:
    error = DataError(f"a.jsonl:3: answer {PERSON!r} is none of them; correct it", quoted=repr(PERSON))
    assert SHOW_ALL.message(error) == str(error)
    assert HIDE.message(error) == (
        "a.jsonl:3: answer [hidden] is none of them; correct it; samples off hides what it quotes"
    )
    assert Redaction(patterns=("Roe",)).message(error) == str(error).replace("Roe", "[redacted]")
    assert HIDE.message(ConfigError("lora.rank is 0")) == "lora.rank is 0"
    assert (SHOW_ALL.message(KeyError(PERSON)), HIDE.message(KeyError(PERSON))) == (f"KeyError: {PERSON!r}", "KeyError")


def test_errors_of_a_block_keep_their_type_and_exit_code() -> None:
    with pytest.raises(LimitBroken, match=r"^\[hidden\] is out") as raised, HIDE.errors():
        raise LimitBroken(f"{PERSON} is out", quoted=PERSON)
    assert raised.value.exit_code == 1
    plain = LimitBroken("too slow")
    with pytest.raises(LimitBroken) as raised, HIDE.errors():
        raise plain
    assert raised.value is plain


UNUSABLE: list[Any] = [
    5, [PERSON], {}, {PERSON: 1}, {"prompt": "a"}, {"prompt": 5, "completion": PERSON}, {"prompt": [PERSON]},
    {"prompt": {PERSON: 1}, "completion": "a"}, {"text": [PERSON]}, {"messages": PERSON}, {"messages": [PERSON] * 2},
    {"messages": [{"role": PERSON, "content": PERSON}]}, {"messages": [{"role": "user", "content": {PERSON: 1}}] * 2},
    {"prompt": "a", "choices": [PERSON, PERSON], "answer": 0}, {"prompt": "a", "choices": PERSON, "answer": 0},
    {"prompt": "a", "choices": ["a", "b"], "answer": PERSON}, {"prompt": "a", "choices": ["a"], "answer": {PERSON: 1}},
    {"prompt": "a", "choices": ["a", "b"], "completion": PERSON},
    {"prompt": "a", "choices": ["a", "b"], "answer": 0, "completion": PERSON},
    {"prompt": "a", "completion": "b", "id": [PERSON]}, {"prompt": "a", "completion": "b", "task": {PERSON: 2}},
    {"conversations": [{"from": PERSON, "value": PERSON}]}, {"instruction": [PERSON], "output": {PERSON: 1}},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": PERSON},
]  # fmt: skip


@pytest.mark.parametrize("row", UNUSABLE, ids=range(len(UNUSABLE)))
def test_unusable_row_is_named_by_its_line_and_not_quoted(row: Any, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with pytest.raises(DataError) as shown:
        read_records((file,), DataConfig(), "test")
    with pytest.raises(DataError) as hidden, HIDE.errors():
        read_records((file,), DataConfig(), "test", HIDE)
    assert str(hidden.value).startswith(f"{file}:2: [hidden] (1 of 2 rows cannot be used; data.bad_rows=drop")
    assert not {"Jane", "Roe"} & set(str(hidden.value).replace("'", " ").split())
    assert str(shown.value).startswith(f"{file}:2: ")


def test_broken_json_is_explained_where_rows_are_hidden(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, PERSON)
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON \(Expecting value, column 1\)"), HIDE.errors():
        read_records((file,), DataConfig(), "test", HIDE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"text": "Jane Roe", "text": "Jane Roe"}]'),
        ("a.jsonl", '{"text": "a"}\n{"text": "Jane Roe", "text": "Jane Roe"}'),
        ("a.csv", 'prompt,choices,answer\nJane Roe,"[{""Jane"": 1, ""Jane"": 2}]",0\n'),
        ("a.csv", "Jane Roe,Jane Roe\na,b\n"),
    ],
)
def test_file_that_cannot_be_parsed_is_not_quoted(name: str, content: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError) as shown:
        read_records((str(file),), DataConfig(), "test")
    with pytest.raises(DataError) as hidden, HIDE.errors():
        read_records((str(file),), DataConfig(), "test")
    assert "Jane" in str(shown.value)
    assert name in str(hidden.value)
    assert "Jane" not in str(hidden.value)


def test_template_that_fails_on_a_row_does_not_quote_it(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"note": "a", "Jane": 1})
    config = from_mapping({"data": {"columns": {"text": "{{ note }}{{ other.Jane }}"}}}).data
    with pytest.raises(DataError, match="Jane"):
        read_records((file,), config, "test")
    with pytest.raises(DataError) as hidden, HIDE.errors():
        read_records((file,), config, "test")
    assert "Jane" not in str(hidden.value)


def test_group_of_overlapping_splits_is_not_named(tmp_path: Path) -> None:
    rows = [{"text": f"a {n}", "patient": PERSON} for n in range(2)]
    files = [write_lines(tmp_path / f"{n}.jsonl", row) for n, row in enumerate(rows)]
    config = DataConfig(train=(files[0],), test=(files[1],), group="patient")
    with pytest.raises(DataError, match="group 'Jane Roe'"):
        load_splits(config, 0)
    with pytest.raises(DataError, match=r"group \[hidden\] as "), HIDE.errors():
        load_splits(config, 0, HIDE)


def test_names_of_unused_columns_are_hidden_with_the_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"text": "a", PERSON: 1})
    caplog.set_level("INFO", logger="prunetune")
    assert isinstance(read_records((file,), DataConfig(), "test", HIDE)[0], Record)
    assert "not used: other columns (1 rows)" in caplog.text
    assert "Jane" not in caplog.text
