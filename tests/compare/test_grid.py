"""Laws of the files of a comparison's cells: a file is used for the cell that made it only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunetune.compare.grid import Cell, CellStore, cell_header
from prunetune.compare.methods import built_in_methods
from prunetune.errors import RunFolderError

CELL = Cell(built_in_methods()["progressive"], keep=0.6, seed=1, learning_rate=1e-3)


@pytest.mark.parametrize("changes", [{"keep": 0.6000001}, {"learning_rate": 1.0000001e-3}])
def test_cell_of_another_number_with_the_same_file_name_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    store, other = CellStore(tmp_path), replace(CELL, **changes)
    (tmp_path / "cells").mkdir()
    store.save(CELL, cell_header(CELL))
    assert other.name == CELL.name
    assert store.load(CELL) == cell_header(CELL)
    with pytest.raises(
        RunFolderError, match=r"progressive-keep0\.6-seed1-lr0\.001\.json was made with .*--out"
    ) as refused:
        store.load(other)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "null", "[]", '{"changes": {}}', "[" * 100_000])
def test_damaged_cell_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{CELL.name}.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"cannot be read .*remove it") as refused:
        CellStore(tmp_path).load(CELL)
    assert "\n" not in str(refused.value)
