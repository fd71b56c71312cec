"""Laws of text that others wrote: JSON is read within bounds, and nothing steers a terminal."""

from __future__ import annotations

import json

import pytest

from prunetune.utils.untrusted import markdown_code, markdown_text, parse_json, printable


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
