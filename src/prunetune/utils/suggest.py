"""Names that a suite may use, and what was probably meant where one is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from prunetune.errors import ConfigError

LISTED = 50  # most names that an error lists


def validate_name(name: str, known: Iterable[str], what: str) -> str:
    """`name`, where it is known; raises `ConfigError`, with `what` in front, where it is not."""
    choices = list(known)
    if name in choices:
        return name
    close = difflib.get_close_matches(name, choices, n=1)
    raise ConfigError(f"{what} {name!r} is not known; {f'did you mean {close[0]}?' if close else _listed(choices)}")


def _listed(choices: list[str]) -> str:
    if len(choices) <= LISTED:
        return f"known are {', '.join(choices)}"
    return f"{len(choices):,} are known, and none has a name like it"
