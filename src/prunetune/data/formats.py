"""File formats: numbered rows of JSON, JSON lines, CSV, Excel, Arrow and Parquet files, in any usual encoding."""

import csv
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from prunetune.errors import DataError
from prunetune.utils.optional import require_installed
from prunetune.utils.untrusted import MAX_BYTES, parse_json, shorten

log = logging.getLogger(__name__)
# A row that cannot be read is an error in its place, so that bad rows can be counted.
NumberedRows = Iterator[tuple[int, Any]]
NESTED = {"choices", "messages"}  # written as JSON in a cell of CSV
UNTYPED = (".csv", ".tsv", ".xlsx")  # all other cells are text
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
MAX_SHEET_ROWS, MAX_SHEET_CELLS = 2**20, 2**25  # of rows, Excel itself has no more
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def data_suffix(name: str) -> str:
    """The ending that names the format, without that of a compression: ".jsonl" of rows.jsonl.gz."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _read_text(path: Path) -> str:
    """The text of a file, uncompressed, its line ends as \\n; raises `DataError`.

    It is UTF-8, UTF-16 with a byte order mark, or else Windows-1252 (a superset of Latin-1's letters), which is said.
    """
    import pyarrow as pa

    compression = COMPRESSED.get(path.suffix.lower())
    try:
        data = pa.input_stream(str(path), compression=compression).read() if compression else path.read_bytes()
    except (OSError, pa.ArrowException) as broken:
        advice = f"not readable as {path.suffix} ({shorten(str(broken), 200)}); compress it again"
        if isinstance(broken, OSError) and broken.strerror:
            advice = f"cannot be read ({broken.strerror}); name a file that this user may open"
        raise DataError(f"{path}: {advice}") from broken
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text: str = data.decode(encoding)
    except UnicodeDecodeError as broken:
        line, byte = data[: broken.start].count(b"\n") + 1, data[broken.start]
        # Not Windows-1252 if it is binary, UTF-8 but for some bytes, or mostly beyond ASCII.
        is_binary = re.search(rb"[\x00-\x08\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d\xff]", data)
        beyond_ascii = data.translate(None, bytes(range(128)))
        if is_binary or len(beyond_ascii) > len(data) / 3 or not data.decode("utf-8", "ignore").isascii():
            told = "it is compressed: let its name end in .gz" if data[:2] == b"\x1f\x8b" else "save the file as UTF-8"
            raise DataError(f"{path}:{line}: not UTF-8 (byte 0x{byte:02x}); {told}") from None
        text = data.decode("cp1252")
        log.warning("%s: not UTF-8, read as Windows-1252: look at line %d", path, line)
    text = text.replace("\r\n", "\n")
    return text if "\n" in text else text.replace("\r", "\n")


def _json(path: Path) -> NumberedRows:
    """Rows of JSON lines, of a list, of one object, or of the only list in one object ({"data": [...]})."""
    text = _read_text(path)
    start, is_list = text[: len(text) - len(text.lstrip())].count("\n") + 1, text.lstrip().startswith("[")
    try:
        value = parse_json(text, nan=True, surrogates=True, unique_keys=True)
    except ValueError as broken:
        at = broken if isinstance(broken, json.JSONDecodeError) else None
        is_lines = data_suffix(path.name) != ".json" or not text.strip() or not (is_list or at)
        if not is_lines and not (at and at.msg.startswith("Extra data")):
            where, reason = (f"{path}:{at.lineno}", f"{at.msg}, column {at.colno}") if at else (path, broken)
            wanted = "a .json file holds a list of objects, or one object a line"
            raise DataError(f"{where}: not valid JSON ({reason}); {wanted}", quoted="" if at else str(reason)) from None
        # Not splitlines, which also splits at U+2028 and other characters that JSON texts may contain.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, nan=True, surrogates=True, unique_keys=True)
            except ValueError as wrong:
                reason = quoted = str(wrong)
                if isinstance(wrong, json.JSONDecodeError):
                    reason, quoted = f"{wrong.msg}, column {wrong.colno}", ""
                advice = f"not valid JSON ({reason}); each line holds one object"
                row = DataError(f"{path}:{number}: {advice}", quoted=quoted)
            yield number, row
        return
    if isinstance(value, Mapping) and len(value) == 1 and not {"messages", "conversations"} & set(value):
        (inner,) = value.values()
        value = inner if isinstance(inner, list) and inner and isinstance(inner[0], Mapping) else value
    yield from enumerate(value, 1) if isinstance(value, list) else [(start, value)]


@contextmanager
def _without_field_limit() -> Iterator[None]:
    """Read cells of any length; the limit of the csv module is global, so it is restored."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _csv(path: Path) -> NumberedRows:
    text = _read_text(path)
    # What separates columns: the mark that makes most of them in the first line, or Excel's own "sep=".
    first = next((line for line in re.split("[\n\r]", text) if line.strip()), "")
    marks = "\t,;|" if data_suffix(path.name) == ".tsv" else ",;\t|"
    with _without_field_limit():
        delimiter = max(marks, key=lambda mark: len(next(csv.reader([first], delimiter=mark), ())))
    if len(first) == 5 and first.startswith("sep="):
        delimiter = first[4]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    header: list[str] = []
    last = 0
    try:
        while True:
            with _without_field_limit():
                cells = next(reader)
            line, last = last + 1, reader.line_num
            if not any(cells) or (line == 1 and "".join(cells) in ("sep=", f"sep={delimiter}")):
                continue
            if header:
                yield line, _csv_row(header, cells, f"{path}:{line}")
            else:
                header = _distinct(cells, path)
    except StopIteration:
        return
    except csv.Error as broken:
        mark = {"\t": "tabs"}.get(delimiter, repr(delimiter))
        advice = f"columns are separated by {mark}: quote texts that hold it, quotes or line ends"
        raise DataError(f"{path}:{last + 1}: not valid CSV ({broken}); {advice}") from None


def _csv_row(header: Sequence[str], cells: Sequence[str], where: str) -> Any:
    if len(cells) > len(header):
        return DataError(f"{where}: {len(cells)} cells under {len(header)} column names; quote texts with commas")
    row: dict[str, Any] = {name: cell or None for name, cell in zip_longest(header, cells) if name or cell}
    for name in NESTED & set(row):
        try:
            row[name] = row[name] and parse_json(row[name], nan=True, surrogates=True, unique_keys=True)
        except ValueError as broken:
            reason = str(getattr(broken, "msg", broken))
            text = f"{where}: column {name}: not valid JSON ({reason}); in a table it holds a JSON list"
            return DataError(text, quoted=reason)
    return row


def _excel(path: Path) -> NumberedRows:
    """The only sheet that holds rows, as a CSV of it would be read; formulas count as what they last gave."""
    require_installed("openpyxl", extra="excel", use=f"reading {path.name}")
    from openpyxl import load_workbook

    try:
        with ZipFile(path) as parts:
            if sum(part.file_size for part in parts.infolist()) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes once unpacked")
        book = load_workbook(path, read_only=True, data_only=True)
        sheets = {sheet.title: list(_filled_rows(sheet)) for sheet in book.worksheets}
        book.close()
    except Exception as broken:  # of zip, XML or what is missing in it: openpyxl lets them through
        reason = shorten(str(broken), 200)
        raise DataError(f"{path}: not readable as Excel ({reason}); save it as .xlsx", quoted=reason) from broken
    tables = [filled for filled in sheets.values() if filled]
    if len(tables) > 1:
        raise DataError(f"{path}: {len(tables)} sheets hold rows ({', '.join(sheets)}); save each as a file of its own")
    for (_, names), *table in tables:
        header = _distinct(names, path)
        for line, cells in table:
            yield line, _csv_row(header, cells, f"{path}:{line}")


def _filled_rows(sheet: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows that hold a text, numbered; raises `ValueError` beyond what a sheet can have, or a file should."""
    sheet.reset_dimensions()  # what a file says of its size may be wrong, and rows beyond it would be lost
    cells_read = 0
    for line, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        cells_read += len(cells)
        if line > MAX_SHEET_ROWS or cells_read > MAX_SHEET_CELLS:
            raise ValueError(f"more than {MAX_SHEET_ROWS:,} rows or {MAX_SHEET_CELLS:,} cells")
        # Excel has no other numbers than floats.
        whole = (int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells)
        if any(texts := ["" if cell is None else str(cell) for cell in whole]):
            yield line, texts


def _distinct(names: Iterable[str], path: Path) -> list[str]:
    """The names of columns; raises `DataError` if two are the same."""
    names, seen = list(names), set[str]()
    for name in names:
        if name and name.strip() in seen:
            shown = shorten(name)
            raise DataError(f"{path}: two columns are called {shown}; rename or remove one", quoted=shown)
        seen.add(name.strip())
    return names


def _parquet(path: Path) -> NumberedRows:
    import pyarrow.parquet as pq

    yield from _arrow_rows(lambda: pq.ParquetFile(path).read(), path, "Parquet")


def _arrow(path: Path) -> NumberedRows:
    import pyarrow as pa

    def read() -> Any:
        with pa.memory_map(str(path)) as file:
            is_file = file.read(6) == b"ARROW1"  # else a stream, as `datasets` writes it
            file.seek(0)
            return (pa.ipc.open_file if is_file else pa.ipc.open_stream)(file).read_all()

    yield from _arrow_rows(read, path, "Arrow")


def _arrow_rows(read: Callable[[], Any], path: Path, name: str) -> NumberedRows:
    import pyarrow as pa

    try:
        table = read()
        _distinct(table.schema.names, path)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as broken:  # two fields of one name within a column, too
        reason = shorten(str(broken), 200)
        raise DataError(f"{path}: not readable as {name} ({reason}); write it again", quoted=reason) from broken
    yield from enumerate(map(without_nulls, rows), 1)


def without_nulls(value: Any) -> Any:
    """The value without fields that are null: a table has every field of a nested column in every row."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# By ending. Each raises `DataError` with file and line if a file cannot be read.
READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".jsonl": _json, ".ndjson": _json, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".arrow": _arrow, ".feather": _arrow, ".xlsx": _excel,
}  # fmt: skip
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # which may be compressed
