"""What others wrote: files and JSON read within bounds, values shown short, text safe for terminals and Markdown."""

import html
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from prunetune.errors import PrunetuneError

MAX_DEPTH = 100  # of lists and objects in each other
MAX_DIGITS = 300  # of a number: with more it is no finite float
MAX_BYTES = 2**30  # of a file

# A half of a surrogate pair, which UTF-8 cannot hold.
SURROGATES = re.compile("[\ud800-\udfff]")
# Control characters except tab and line feed (C0, DEL, C1), marks that turn the direction of text, line separators.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file; raises `OSError`, and `ValueError` for no regular file, one too large, or no UTF-8."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, and {max_bytes:,} are read at most")
    return path.read_text(encoding="utf-8")


def refuse_special_files(files: Iterable[Path], error: type[PrunetuneError]) -> None:
    """Raise this error for a pipe, socket or device, or a link to one, among the files: a reader might never end."""
    for file in files:
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise error(f"{file} is a pipe or a device, which neither a run nor a model has: remove it")


def parse_json(text: str | bytes, *, nan: bool = False, surrogates: bool = False, unique_keys: bool = False) -> Any:
    """The value of a JSON text; raises `ValueError` whatever is wrong, such as depth beyond `MAX_DEPTH`.

    NaN, infinite numbers and integers that are no finite float are refused; with `nan` they are read. Halves of
    surrogate pairs become U+FFFD, so that every string of the value can be written as UTF-8 again; with `surrogates`
    they stay. With `unique_keys`, an object with two fields of one name is refused.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    not_finite: Callable[[str], Any] = float if nan else _refuse_number
    max_digits = 1000 if nan else MAX_DIGITS  # Python itself refuses 4,300
    try:
        value = json.loads(
            text,
            parse_constant=not_finite,
            parse_float=lambda digits: number if math.isfinite(number := float(digits)) else not_finite(digits),
            parse_int=lambda digits: int(digits) if len(digits) <= max_digits else not_finite(digits),
            object_pairs_hook=_with_unique_keys if unique_keys else None,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError("it is nested too deeply")
    has_surrogates = not surrogates and ("\\u" in text or SURROGATES.search(text))
    return _without_surrogates(value) if has_surrogates else value


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"two fields are called {shorten(twice)}, in {short_repr(fields)}")
    return fields


def _refuse_number(digits: str) -> NoReturn:
    raise ValueError(f"it holds {digits[:20]}, which is no finite number")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, list | dict)]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, list | dict) for item in level)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return "a huge number" if x.bit_length() > 200 else repr(x)  # Python writes no int of more than 4,300 digits


def short_repr(value: Any) -> str:
    """The repr of a value in at most 80 characters, for an error: neither its size nor its depth matters."""
    return shorten(_ShortRepr().repr(value))


def shorten(text: str, length: int = 80) -> str:
    """One line of at most `length` characters, for an error: a row may be as long as a book."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else f"{line[: length - 3]}..."


def printable(text: str) -> str:
    r"""The text with what would steer a terminal written as an escape: `\x1b` in place of ESC. Tabs and lines stay."""
    return UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text)


def markdown_text(text: str) -> str:
    """The text as part of one line of Markdown: it opens no tag, link, code or column of a table."""
    line = html.escape(printable(" ".join(text.split())), quote=False)
    return re.sub(r"[\\`\[\]|]", r"\\\g<0>", line)


def markdown_code(text: str) -> str:
    """The text as inline code of Markdown, in a fence that is longer than any in it."""
    line = printable(" ".join(text.split()))
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
