"""SQLite files that only save work: a damaged one is renamed, so that a new one takes its place."""

import logging
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that writes
# What is raised where a file cannot be used: locked, a folder, without permission, values that it cannot hold.
UNUSABLE = (OSError, sqlite3.Error, ValueError)


def run_in_database(file: Path, tables: Sequence[str], work: Callable[[sqlite3.Connection], T]) -> T:
    """What `work` returns, in one transaction on the file, with the `tables` (SQL) created where they are missing.

    A file that is no database, or a damaged one, is renamed, and `work` runs again on a new one. Raises `UNUSABLE`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _run(file, tables, work)
    except sqlite3.DatabaseError as broken:
        if type(broken) is not sqlite3.DatabaseError:  # its subclasses: locked, no permission, another schema
            raise
        aside = file.with_name(f"{file.name}.broken-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        file.rename(aside)
        log.warning("%s is no database any more (%s): renamed to %s, and a new one created", file, broken, aside.name)
        return _run(file, tables, work)


def _run(file: Path, tables: Sequence[str], work: Callable[[sqlite3.Connection], T]) -> T:
    with closing(sqlite3.connect(file, timeout=LOCK_TIMEOUT)) as store, store:
        store.text_factory = lambda text: text.decode("utf-8", "replace")
        for table in tables:
            store.execute(table)
        return work(store)
