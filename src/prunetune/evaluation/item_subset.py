"""Which rows of a task are scored where a limit is set, and the unique ids of their items."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Protocol, TypeVar


class HasId(Protocol):
    """Anything with an id."""

    @property
    def id(self) -> str: ...


HasIdT = TypeVar("HasIdT", bound=HasId)


def stable_sample(rows: Sequence[HasIdT], limit: int) -> list[HasIdT]:
    """The first `limit` rows (0: all) in the order of their ids' hashes, so that added rows do not reshuffle others."""
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())
    return shuffled[:limit] if limit else shuffled


def make_ids_unique(ids: Sequence[str]) -> list[str]:
    """Append "#2", "#3" to ids that repeat, so that two evaluations can be compared item by item."""
    seen: Counter[str] = Counter()
    unique = []
    for name in ids:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
