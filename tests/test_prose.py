"""User pages are written in short sentences: README and docs keep the bounds of `docs/measure_prose.py`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("measure_prose", ROOT / "docs" / "measure_prose.py")
assert SPEC
assert SPEC.loader
prose = importlib.util.module_from_spec(SPEC)
sys.modules["measure_prose"] = prose  # dataclasses look their module up
SPEC.loader.exec_module(prose)


@pytest.mark.parametrize("page", prose.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_keeps_the_bounds_of_prose(page: Path) -> None:
    """If this fails, run `python docs/measure_prose.py` and shorten the sentences that it prints."""
    assert not prose.measure(page.read_text(encoding="utf-8")).broken()


def test_measures_leave_out_code_tables_and_comments() -> None:
    page = (
        "# A; heading\n\n<!-- a; b -->\nOne `a; b` is here. [Two; words](x.md#y) end it.\n\n| a; b | c |\n|---|---|\n"
    )
    found = prose.measure(
        page + "\n```bash\none; two\n```\n\n- First item of three\n- Second item of it\n\n    code; here\n"
    )
    assert found.sentences == ["One CODE is here.", "Two; words end it.", "First item of three", "Second item of it"]
    assert found.semicolons == 2
    assert found.lengths() == [4, 4, 4, 4]


def test_page_that_breaks_every_bound_is_told_of_each() -> None:
    assert len(prose.measure(f"As {'word ' * 30}; in M1 ; and T22;.\n\n" * 5).broken()) == 4
