"""Marked tables in README and docs hold the figures of the files that they name; `quality/tables.py` writes them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prunetune.compare.markdown import format_difference
from support.comparison import realistic

ROOT = Path(__file__).parents[1]
QUALITY = ROOT / "benchmarks" / "quality"


@pytest.fixture(scope="module")
def tables() -> Any:
    """The module benchmarks/quality/tables.py, which imports its neighbours."""
    import importlib

    sys.path.insert(0, str(QUALITY))
    yield importlib.import_module("tables")
    sys.path.remove(str(QUALITY))


def test_marked_tables_are_those_of_their_files(tables: ModuleType) -> None:
    """If this fails, run `python benchmarks/quality/tables.py`."""
    marks = 0
    for page in tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert tables.with_tables(text) == text, page
        marks += len(tables.MARK.findall(text))
        assert len(tables.MARK.findall(text)) == text.count("<!-- figures:"), page
    assert marks


def test_figure_that_was_typed_is_put_right(tables: ModuleType) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| legal | overruling |"))
    assert tables.with_tables(text.replace(row, row.replace("0.500", "0.501"))) == text
    assert tables.with_tables(text.replace(row + "\n", "")) == text


def test_table_of_methods_is_computed_from_the_cells(tables: ModuleType, tmp_path: Path) -> None:
    merged = sys.modules["merged"]
    file, cells = tmp_path / "legal.json", realistic(["dense", "fisher", "progressive"], [0.6], [0, 1])
    merged.write_results(file, merged.Results("SmolLM2-135M-Instruct", "test", cells))
    assert merged.read_results([file]).cells == cells
    mark = f'<!-- figures: methods {file} keep=0.6 methods=dense,fisher columns="nll,-nll,cost" -->'
    page = f"Before.\n\n{mark}\n\nAfter.\n"
    rows = {row["method"]: row for row in merged.read_results([file]).comparison()["rows"]}
    score = rows["fisher"]["scores"]["nll"]
    written = tables.with_tables(page)
    assert written.startswith(page.partition("\n\nAfter")[0] + "\n_SmolLM2-135M-Instruct, 2026-11-30, commit")
    assert written.endswith(" |\n\nAfter.\n")
    assert "| method | nll | nll - progressive | cost |" in written
    assert f"| fisher | {score['value']:.3f} | {format_difference(score)} | 60 |" in written
    assert tables.with_tables(written) == written
