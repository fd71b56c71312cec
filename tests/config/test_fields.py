"""Fields of options: a custom parser reads the value, or each entry of a tuple."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from prunetune.config.fields import option, read_options, sources
from prunetune.errors import ConfigError


def even(value: Any, name: str) -> int:
    """A whole number that divides by two."""
    if not isinstance(value, int) or value % 2:
        raise ConfigError(f"{name} must be even, got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class Example:
    """Options that are read by parsers."""

    width: int = option(2, "A width.", parse=even)
    widths: tuple[int, ...] = option((), "Widths.", parse=even)
    data: tuple[str, ...] = sources("Sources.")


def test_parser_reads_the_value_and_each_entry() -> None:
    values = {"width": 4, "widths": [2, 6], "data": ["a.jsonl", {"source": "b.csv", "weight": 2}]}
    assert read_options(Example, values, where="x") == Example(width=4, widths=(2, 6), data=("a.jsonl", "b.csv*2"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 3}, r"^x: width must be even, got 3$"),
        ({"widths": [2, 3]}, r"^x: widths must be even, got 3$"),
        ({"data": [3]}, r"^x: data: a source is text, or \{source: \.\.\., weight: \.\.\.\}, got 3$"),
        ({"data": 3}, r"^x: data must be a source or a list of sources, got 3$"),
    ],
)
def test_errors_of_a_parser_begin_with_the_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(Example, values, where="x")
