"""Tables: text that fits a terminal, with every word and without colours."""

from __future__ import annotations

import pytest

from prunetune.utils import tables
from prunetune.utils.tables import MIN_WIDTH, UNLIMITED_WIDTH, table_lines, table_width

HEADINGS = ("task", ">score", "remark")
ROWS = [("routing", "0.5", "fine"), ("a", "12.25", "far better than before"), ("short",)]


def test_columns_are_aligned() -> None:
    assert table_lines(HEADINGS, ROWS) == [
        "task     score  remark",
        "routing    0.5  fine",
        "a        12.25  far better than before",
        "short",
    ]


def test_markup_and_colours_are_plain_text() -> None:
    lines = table_lines(("name",), [("[bold red]x[/] [0]",)])
    assert lines == ["name", "[bold red]x[/] [0]"]


def test_table_row_is_one_line_in_a_file() -> None:
    assert table_width() == UNLIMITED_WIDTH  # pytest captures standard output
    assert len(table_lines(HEADINGS, [("x", "1", "word " * 200)])) == 2


def test_table_row_is_folded_to_the_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    assert table_width() == MIN_WIDTH
    lines = table_lines(HEADINGS, [("x", "1234567890", "w" * 200)])
    assert max(map(len, lines)) <= MIN_WIDTH
    assert "1234567890" in lines[1]
    assert sum(line.count("w") for line in lines) == 200
    numbers = tuple(str(10**9 + place) for place in range(9))
    assert all(number in table_lines([">n"] * 9, [numbers])[1] for number in numbers), "no digit is left out"
