"""Laws of text that others wrote: JSON is read within bounds, and nothing steers a terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunetune.utils.untrusted import (
    MAX_DEPTH,
    markdown_code,
    markdown_text,
    parse_json,
    printable,
    read_text,
    short_repr,
    shorten,
)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 980 + "1" + "}" * 980 + ' "\\u"',
        "NaN",
        "[-Infinity]",
        "1e999",
        "{",
        "",
        b"\xff",
        "1" * 5000,
    ],
)
def test_json_out_of_bounds_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_every_string_of_parsed_json_can_be_written() -> None:
    value = parse_json(r'{"\ud800 key": ["half \udfff", "whole \ud83d\ude00"]}')
    assert value == {"\ufffd key": ["half \ufffd", "whole \U0001f600"]}
    json.dumps(value, ensure_ascii=False).encode()


def test_json_with_nan_is_read_where_asked_for() -> None:
    value = parse_json("[NaN, Infinity]", nan=True)
    assert value[0] != value[0]
    assert value[1] == float("inf")


def test_nothing_printable_steers_a_terminal() -> None:
    text = "".join(map(chr, range(0x2100))) + "\ud800"
    shown = printable(text)
    for steering in "\x1b\x07\r\x9b\u202e\u2066\u200f\ud800":
        assert steering not in shown
    assert "\t" in shown
    assert "\n" in shown
    assert "\\x1b" in shown
    shown.encode()


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("owner/name-1_b", "owner/name-1_b"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("![x](http://h) | a", "!\\[x\\](http://h) \\| a"),
        ("`a`\n\n## b", "\\`a\\` ## b"),
        ("\x1b[2J\u202e", "\\\\x1b\\[2J\\\\u202e"),
    ],
)
def test_markdown_text_opens_no_markup(text: str, markdown: str) -> None:
    assert markdown_text(text) == markdown


@pytest.mark.parametrize(
    ("text", "markdown"), [("a: <b>", "`a: <b>`"), ("``` x", "```` ``` x ````"), ("a`b\n\n# c", "``a`b # c``")]
)
def test_markdown_code_is_not_ended_by_its_text(text: str, markdown: str) -> None:
    assert markdown_code(text) == markdown


def test_json_is_read_to_one_depth_everywhere() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for text in ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), '{"a":' * 150 + "1" + "}" * 150):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json(text)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert read_text(tmp_path / "file", max_bytes=4) == "text"
    with pytest.raises(ValueError, match="4 bytes, and 3 are read"):
        read_text(tmp_path / "file", max_bytes=3)
    (tmp_path / "link").symlink_to("/dev/zero")  # of a run folder that somebody sent
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="no regular file"):
            read_text(path)


def test_values_are_shown_in_one_short_line() -> None:
    bomb: object = "x"
    for _ in range(20):
        bomb = [bomb] * 9
    for value in (bomb, 10**5000, {10**5000: "a\nb"}, "x" * 10**6, ["x"] * 10**6, {"a": "\ud800" * 100}):
        assert len(short_repr(value)) <= 80
        assert "\n" not in short_repr(value)
    assert short_repr({"a": [1, None, "b"]}) == "{'a': [1, None, 'b']}"
    assert len(shorten("word " * 10**6, 200)) <= 200
