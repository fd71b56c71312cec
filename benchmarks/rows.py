"""Rows of results.jsonl as benchmarks give them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def give(row: Mapping[str, Any], out: Path | None) -> None:
    """Append a row to a file as one line, or print it where there is none."""
    line = json.dumps(row, ensure_ascii=False)
    if out is None:
        print(line, flush=True)
        return
    with out.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
