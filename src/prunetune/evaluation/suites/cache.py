"""Cache of a model's answers, by model and request: an SQLite file in the user's cache folder.

A damaged file is renamed, so that a new one takes its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunetune.data.records import Record
from prunetune.evaluation.suites.protocol import Backend, GenerationSettings, OnRequestsDone, RequestKind
from prunetune.model.gguf_import import cache_folder
from prunetune.utils.redaction import SHOW_ALL, Redaction
from prunetune.utils.untrusted import parse_json

log = logging.getLogger(__name__)
# What a key calls each kind (the words of 0.1.0, so that its caches stay valid), and a version that rises whenever
# answers of the kind are computed differently.
KEY_WORDS: Mapping[RequestKind, str] = {"loglikelihood": "choose", "generate": "write", "nll": "weigh"}
REQUEST_VERSIONS: Mapping[RequestKind, int] = {"loglikelihood": 1, "generate": 2, "nll": 2}
TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS files (stamp TEXT PRIMARY KEY, digest TEXT NOT NULL) WITHOUT ROWID",
)
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that writes
# What is raised where a file cannot be used: locked, a folder, without permission, values that it cannot hold.
UNUSABLE = (OSError, sqlite3.Error, ValueError)
KEYS_PER_QUERY = 500
ANSWERS_PER_WRITE = 1000  # an evaluation that is stopped loses at most this many


@dataclass
class AnswerStore:
    """The SQLite file: answers, and digests of model files. If it cannot be used, only a warning is logged."""

    path: Path = field(default_factory=lambda: cache_folder() / "answers.sqlite")

    def get(self, table: str, keys: Sequence[str]) -> dict[str, str]:
        """The stored values of these keys, as far as there are any."""

        def read(store: sqlite3.Connection) -> dict[str, str]:
            known: dict[str, str] = {}
            for start in range(0, len(keys), KEYS_PER_QUERY):
                asked = keys[start : start + KEYS_PER_QUERY]
                marks = ",".join("?" * len(asked))
                known |= dict(store.execute(f"SELECT * FROM {table} WHERE {_KEYS[table]} IN ({marks})", asked))  # noqa: S608 - table names are ours
            return {key: value for key, value in known.items() if isinstance(value, str)}

        try:
            stored: dict[str, str] = self._run(read)
            return stored
        except UNUSABLE as broken:
            log.warning("cache %s: cannot be read (%s); remove it to have one again", self.path, broken)
            return {}

    def put(self, table: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Store (key, value) pairs; later ones replace earlier ones."""
        rows = list(pairs)
        try:
            self._run(lambda store: store.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", rows))  # noqa: S608 - table names are ours
        except UNUSABLE as broken:
            log.warning("cache %s: cannot be written (%s)", self.path, broken)

    def _run(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """What `work` returns, in one transaction; where the file is no database, on a new one. Raises `UNUSABLE`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._run_once(work)
        except sqlite3.DatabaseError as broken:
            if type(broken) is not sqlite3.DatabaseError:  # its subclasses: locked, no permission, another schema
                raise
            aside = self.path.with_name(f"{self.path.name}.broken-{datetime.now(UTC):%Y%m%d-%H%M%S}")
            self.path.rename(aside)
            log.warning(
                "%s is no database any more (%s): renamed to %s, a new one created", self.path, broken, aside.name
            )
            return self._run_once(work)

    def _run_once(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        with closing(sqlite3.connect(self.path, timeout=LOCK_TIMEOUT)) as store, store:
            store.text_factory = lambda text: text.decode("utf-8", "replace")
            for table in TABLES:
                store.execute(table)
            return work(store)


_KEYS = {"answers": "key", "files": "stamp"}


@dataclass
class CachedBackend:
    """A backend that computes only the answers that are not in the cache."""

    backend: Backend
    store: AnswerStore
    redaction: Redaction = SHOW_ALL  # an answer of which a part may not be shown is not kept
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self.backend.name

    @property
    def fingerprint(self) -> str:
        """See `Backend`."""
        return self.backend.fingerprint

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        """See `Backend`."""
        return self.backend.model_and_tokenizer()

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """See `Backend`."""
        if not self.fingerprint:
            self.cache_misses += len(records)
            return self.backend.run_requests(kind, records, settings, tick)
        keys = [cache_key(self.fingerprint, kind, record, settings) for record in records]
        stored = self.store.get("answers", list(dict.fromkeys(keys)))
        known = {
            key: answer
            for key, record in zip(keys, records, strict=True)
            if key in stored and (answer := parse_answer(stored[key], kind, record)) is not None
        }
        missing = [index for index, key in enumerate(keys) if key not in known]
        self.cache_hits += len(keys) - len(missing)
        self.cache_misses += len(missing)
        tick(len(keys) - len(missing))
        for start in range(0, len(missing), ANSWERS_PER_WRITE):
            chunk = missing[start : start + ANSWERS_PER_WRITE]
            answers = self.backend.run_requests(kind, [records[index] for index in chunk], settings, tick)
            fresh = {keys[index]: answer for index, answer in zip(chunk, answers, strict=True)}
            kept = [item for item in fresh.items() if kind != "generate" or self.redaction.text(item[1]) == item[1]]
            self.store.put("answers", [(key, json.dumps(answer)) for key, answer in kept])
            known |= fresh
        return [known[key] for key in keys]


def parse_answer(text: str, kind: RequestKind, record: Record) -> Any:
    """The answer in a row of the cache; None for one that is damaged, which is asked again and replaced."""
    try:
        answer = parse_json(text, nan=True)
    except ValueError:
        return None
    if kind == "generate":
        return answer if isinstance(answer, str) else None
    rows, count, length = (answer, len(record.choices), 2) if kind == "loglikelihood" else ([answer], 1, 3)
    is_whole = (
        isinstance(rows, list)
        and len(rows) == count
        and all(isinstance(row, list) and len(row) == length for row in rows)
        and all(type(number) in (int, float) for row in rows for number in row)
    )
    return answer if is_whole else None


def cache_key(fingerprint: str, kind: RequestKind, record: Record, settings: GenerationSettings) -> str:
    """SHA-256 of everything that an answer depends on."""
    asked_for: dict[RequestKind, list[Any]] = {
        "loglikelihood": [record.choices],
        "generate": [settings.max_new_tokens, settings.stop],
        "nll": [record.completion],
    }
    chat = [record.tools] if record.tools else []
    if record.kind == "chat" and settings.template != "raw":
        chat.append("0.2")  # since then, its prompt may end with an empty thought
    messages = [message.texts for message in record.messages]
    request = [record.kind, record.prompt, messages, *asked_for[kind], *chat]
    return _digest([REQUEST_VERSIONS[kind], fingerprint, KEY_WORDS[kind], settings.template, request])


def folder_hash(folder: Path, store: AnswerStore) -> str:
    """SHA-256 over weights, configuration, tokenizer and code of a model folder.

    A file is read once: afterwards its path, size and times identify its contents.
    """
    # The card can change while the model does not.
    return files_hash(sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"), store)


def files_hash(files: Sequence[Path], store: AnswerStore) -> str:
    """SHA-256 over the names and contents of files of different names."""
    stamps = {path.name: _stamp(path) for path in files}
    stored = store.get("files", list(stamps.values()))
    known = {stamp: digest for stamp, digest in stored.items() if re.fullmatch("[0-9a-f]{64}", digest)}
    digests, fresh = {}, []
    for path in files:
        stamp = stamps[path.name]
        if stamp not in known:
            fresh.append((stamp, _contents(path)))
        digests[path.name] = known.get(stamp) or fresh[-1][1]
    if fresh:
        store.put("files", fresh)
    return _digest(sorted(digests.items()))


def _stamp(path: Path) -> str:
    status = path.stat()
    # Tools that copy a file's other times cannot set back its time of change (ctime).
    return f"{path.resolve()}/{status.st_size}/{status.st_mtime_ns}/{status.st_ctime_ns}/{status.st_ino}"


def _contents(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
