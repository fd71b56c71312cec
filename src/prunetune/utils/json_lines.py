"""JSON objects, and files that hold one a line (.jsonl)."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prunetune.utils.files import write_text
from prunetune.utils.untrusted import parse_json

JsonObject = dict[str, Any]


def finite_or_none(value: Any) -> Any:
    """The value, or nested values, with None in place of nan and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_cut(record: JsonObject) -> bool:
    """Whether the record of a step is of the first one after a real cut; those of a search have widths, too."""
    return "widths" in record and record.get("phase") in ("prune", "tune")


def append_json_line(path: Path, record: JsonObject) -> None:
    """Add a record at the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write_json_lines(path: Path, records: Iterable[JsonObject]) -> None:
    """Replace a file in one step."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_json_lines(path: Path) -> tuple[list[JsonObject], int]:
    """The records of a file, and the count of lines that hold none, as the last one after a kill; raises `OSError`."""
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = parse_json(line, nan=True)
        except ValueError:
            value = None
        if isinstance(value, dict):
            records.append(value)
        else:
            broken += bool(line.strip())
    return records, broken
