"""Figures in README and docs are those of the files of results: marked tables, README's prose and its picture."""

from __future__ import annotations

import importlib
import json
import re
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


def test_figures_in_prose_are_computed_again(tables: ModuleType) -> None:
    """If this fails, correct the page: the figure is what the file of results says. New ones go into `claims.py`."""
    pages: dict[str, str] = {}
    claims = importlib.import_module("claims").claims()
    for claim in claims:
        if claim.page not in pages:
            text = tables.MARK.sub("", (ROOT / claim.page).read_text(encoding="utf-8"))
            text = re.sub(r"^```.*?^```|`[^`\n]+`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
            pages[claim.page] = " ".join(text.split())
        words = claim.text.replace("{}", claim.figure())
        assert words in pages[claim.page], claim.page
    readme = pages["README.md"]
    for claim in claims:
        readme = readme.replace(claim.text.replace("{}", claim.figure()), claim.text)
    versions, shares = {"3.11", "5.14", "2026.10", "2.0"}, {"40%", "60%"}
    assert set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])|\d+%", readme)) <= versions | shares


def test_picture_in_readme_is_that_of_the_results(tables: ModuleType) -> None:
    """If this fails, run `python benchmarks/quality/picture.py`."""
    picture = importlib.import_module("picture")
    assert picture.FILE.read_text(encoding="utf-8") == picture.picture()


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
    rows = {row["method"]: row for row in merged.read_results([file]).comparison([0.6])["rows"]}
    score = rows["fisher"]["scores"]["nll"]
    written = tables.with_tables(page)
    assert written.startswith(page.partition("\n\nAfter")[0] + "\n_SmolLM2-135M-Instruct, 2026-11-30, commit")
    assert written.endswith(" |\n\nAfter.\n")
    assert "| method | nll | nll - progressive | cost |" in written
    assert f"| fisher | {score['value']:.3f} | {format_difference(score)} | 60 |" in written
    assert tables.with_tables(written) == written


def test_first_file_of_a_summary_counts_for_a_method_and_a_budget(tables: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    columns = ["method", "keep", "learning_rate", "seeds", "acc", "nll", "nll_sd", "domain_ppl", "general_ppl"]
    dense = ["dense", 0.6, 5e-4, 3, 0.7, 1.1, 0.01, 14.0, 23.0]
    new, old = (["taylor", 0.6, 1e-3, 1, 0.6, nll, None, 30.0, ppl] for nll, ppl in ((1.3, 99.6), (1.4, 1234.0)))
    other = ["taylor", 0.4, 1e-3, 1, 0.5, 1.5, None, 40.0, 1234.0]
    files = {"new": {"rows": [dense, new]}, "old": {"rows": [old, other]}}
    file.write_text(json.dumps({"columns": columns, "files": files}))
    summary = tables.with_tables(f"<!-- figures: summary {file} files=new,old keep=0.6 -->\n")
    assert "| dense | 0.0005 | 3 | 0.700 | 1.100 | 0.010 |" in summary
    assert "| taylor | 0.001 | 1 | 0.600 | 1.300 |  |" in summary
    budgets = tables.with_tables(f"<!-- figures: budgets {file} files=new,old methods=dense,taylor -->\n")
    assert budgets.splitlines()[3:] == [
        "| 0% | 1.100 (23) |  |",
        "| 40% |  | 1.300 (100) |",
        "| 60% |  | 1.500 (1,234) |",
    ]
