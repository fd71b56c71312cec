"""Readers of data files: JSON lines, JSON, CSV, TSV, Parquet. Each yields (line number, row) pairs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunetune.errors import DataError
from prunetune.utils.untrusted import parse_json

NumberedRows = Iterator[tuple[int, Any]]
NESTED = ("choices", "messages")  # written as JSON in a cell of CSV
UNTYPED = (".csv", ".tsv")  # all other cells are text


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark; raises `DataError`."""
    try:
        data = path.read_bytes()
    except OSError as broken:
        raise DataError(f"{path}: cannot be read ({broken.strerror}); name a file that this user may open") from broken
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as broken:
        line = data[: broken.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{data[broken.start]:02x}); save the file as UTF-8") from None


def _parse_json(text: str, where: str, wanted: str) -> Any:
    """The value of a JSON text; raises `DataError`, which begins with `where` and ends with what is wanted there."""
    try:
        return parse_json(text, nan=True, surrogates=True)  # that a field is wrong matters only if it is read
    except json.JSONDecodeError as broken:
        raise DataError(f"{where}: not valid JSON ({broken.msg}, column {broken.colno}); {wanted}") from None
    except ValueError as broken:
        raise DataError(f"{where}: not valid JSON ({broken}); {wanted}") from None


def _json_lines(path: Path) -> NumberedRows:
    # Not splitlines, which also splits at U+2028 and other characters that JSON texts may contain.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            yield number, _parse_json(line, f"{path}:{number}", "each line holds one object")


def _json(path: Path) -> NumberedRows:
    text = _read_text(path)
    if text.lstrip().startswith("["):
        wanted = "a .json file holds a list of objects, or one object a line"
        yield from enumerate(_parse_json(text, str(path), wanted), 1)
    else:
        yield from _json_lines(path)


@contextmanager
def _without_field_limit() -> Iterator[None]:
    """Read cells of any length; the limit of the csv module is global, so it is restored."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv(path: Path) -> NumberedRows:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True, delimiter=delimiter)
    header: list[str] = []
    last = 0
    try:
        while True:
            with _without_field_limit():
                cells = next(reader)
            line, last = last + 1, reader.line_num
            if not any(cells):
                continue
            if header:
                yield line, _csv_row(header, cells, f"{path}:{line}")
            header = header or cells
    except StopIteration:
        return
    except csv.Error as broken:
        advice = "quote texts with commas, quotes or line ends"
        raise DataError(f"{path}:{last + 1}: not valid CSV ({broken}); {advice}") from None


def _csv_row(header: list[str], cells: list[str], where: str) -> Mapping[str, Any]:
    if len(cells) > len(header):
        raise DataError(f"{where}: {len(cells)} cells under {len(header)} column names; quote texts with commas")
    row: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
    for name in NESTED:
        if name in row:
            row[name] = _parse_json(row[name], f"{where}: column {name}", "in a table it holds a JSON list")
    return row


def _parquet(path: Path) -> NumberedRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as broken:
        reason = " ".join(str(broken).split())[:200]
        raise DataError(f"{path}: not readable as Parquet ({reason}); write it again") from broken
    yield from enumerate(rows, 1)


# By suffix. Each raises `DataError` with file and line if a file cannot be read.
READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
