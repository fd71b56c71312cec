"""Suggestions for a name that is not known: "did you mean ...?"."""

import difflib
from collections.abc import Iterable

from prunetune.errors import ConfigError

MAX_NAMES_LISTED = 50  # in one error


def similar_names(name: str, known: Iterable[str], *, at_most: int = 3) -> list[str]:
    """Known names that are spelt like `name`, the likest first."""
    return difflib.get_close_matches(name, list(known), n=at_most, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean accuracy?", or "" where no known name is spelt like it."""
    similar = similar_names(name, known, at_most=1)
    return f"did you mean {similar[0]}?" if similar else ""


def validate_name(name: str, known: Iterable[str], what: str) -> str:
    """`name`, if it is known; raises `ConfigError` that begins with `what`, such as "scorer", if it is not."""
    names = list(known)
    if name in names:
        return name
    listed = f"known are {', '.join(names)}"
    if len(names) > MAX_NAMES_LISTED:
        listed = f"{len(names):,} are known, and none has a name like it"
    raise ConfigError(f"{what} {name!r} is not known; {did_you_mean(name, names) or listed}")
