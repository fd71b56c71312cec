"""Cache of a model's answers, by model and request: files of JSON lines in the user's cache folder."""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prunetune.data.records import Record
from prunetune.evaluation.suites.protocol import Backend, GenerationSettings, OnRequestsDone, RequestKind
from prunetune.model.gguf_import import cache_folder
from prunetune.utils.files import sha256
from prunetune.utils.json_lines import JsonObject, read_json_lines
from prunetune.utils.redaction import SHOW_ALL, Redaction

log = logging.getLogger(__name__)
# What a key calls each kind (the words of 0.1.0, so that its caches stay valid), and a version that rises whenever
# answers of the kind are computed differently.
KEY_WORDS: Mapping[RequestKind, str] = {"loglikelihood": "choose", "generate": "write", "nll": "weigh"}
REQUEST_VERSIONS: Mapping[RequestKind, int] = {"loglikelihood": 1, "generate": 2, "nll": 2}
ANSWERS_PER_WRITE = 1000  # an evaluation that is stopped loses at most this many


@dataclass
class AnswerStore:
    """A folder of JSON lines: a file for each model's answers, and one of digests of model files.

    A line that is cut short or damaged is passed over. If a file cannot be used, only a warning is logged.
    """

    folder: Path = field(default_factory=lambda: cache_folder() / "answers")

    def get(self, name: str) -> JsonObject:
        """The values in a file by key; later ones replace earlier ones."""
        file = self.folder / f"{name}.jsonl"
        try:
            records = read_json_lines(file)[0] if file.exists() else []
        except OSError as broken:
            log.warning("cache %s: cannot be read (%s); remove it to have one again", file, broken)
            records = []
        return {key: value for record in records for key, value in record.items()}

    def put(self, name: str, values: Mapping[str, Any]) -> None:
        """Add values to a file."""
        file = self.folder / f"{name}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:  # after a line that a kill has cut short
                lines.write("".join(f"\n{json.dumps({key: value})}" for key, value in values.items()) + "\n")
        except OSError as broken:
            log.warning("cache %s: cannot be written (%s)", file, broken)


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
        known = {
            key: self._stored[key]
            for key, record in zip(keys, records, strict=True)
            if key in self._stored and is_answer(self._stored[key], kind, record)
        }
        missing = [index for index, key in enumerate(keys) if key not in known]
        self.cache_hits += len(keys) - len(missing)
        self.cache_misses += len(missing)
        tick(len(keys) - len(missing))
        for start in range(0, len(missing), ANSWERS_PER_WRITE):
            chunk = missing[start : start + ANSWERS_PER_WRITE]
            answers = self.backend.run_requests(kind, [records[index] for index in chunk], settings, tick)
            fresh = {keys[index]: answer for index, answer in zip(chunk, answers, strict=True)}
            may_be_kept = (kind != "generate" or self.redaction.text(answer) == answer for answer in fresh.values())
            kept = dict(itertools.compress(fresh.items(), may_be_kept))
            self.store.put(_digest(self.fingerprint), kept)
            self._stored.update(kept)
            known |= fresh
        return [known[key] for key in keys]

    @cached_property
    def _stored(self) -> JsonObject:
        """The model's answers by `cache_key`."""
        return self.store.get(_digest(self.fingerprint))


def is_answer(answer: Any, kind: RequestKind, record: Record) -> bool:
    """Whether a value of the cache is an answer to this request; one that is damaged is asked again and replaced."""
    if kind == "generate":
        return isinstance(answer, str)
    rows, count, length = (answer, len(record.choices), 2) if kind == "loglikelihood" else ([answer], 1, 3)
    return (
        isinstance(rows, list)
        and len(rows) == count
        and all(isinstance(row, list) and len(row) == length for row in rows)
        and all(type(number) in (int, float) for row in rows for number in row)
    )


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
    known = {stamp: digest for stamp, digest in store.get("files").items() if re.fullmatch("[0-9a-f]{64}", str(digest))}
    fresh = {stamps[path.name]: sha256(path) for path in files if stamps[path.name] not in known}
    if fresh:
        store.put("files", fresh)
    return _digest(sorted((name, (known | fresh)[stamp]) for name, stamp in stamps.items()))


def _stamp(path: Path) -> str:
    status = path.stat()
    # Tools that copy a file's other times cannot set back its time of change (ctime).
    return f"{path.resolve()}/{status.st_size}/{status.st_mtime_ns}/{status.st_ctime_ns}/{status.st_ino}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
