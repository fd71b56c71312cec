"""Text that others wrote: JSON read within bounds, and strings made safe for a terminal, a page, or Markdown."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any, NoReturn

# A half of a surrogate pair, which UTF-8 cannot hold.
SURROGATES = re.compile("[\ud800-\udfff]")
# Control characters except tab and line feed (C0, DEL, C1), marks that turn the direction of text, line separators.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """The value of a JSON text; NaN and infinite numbers only with `nan`. Raises `ValueError` whatever is wrong.

    Halves of surrogate pairs become U+FFFD, so that every string of the value can be written as UTF-8 again.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text) if nan else json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        return _without_surrogates(value) if "\\u" in text or SURROGATES.search(text) else value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no finite number")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse_constant(digits)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


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
