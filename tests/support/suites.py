"""Suite files with their data, tiny model folders, and a backend whose answers the test decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from prunetune.data.records import Record
from prunetune.evaluation.suites.protocol import GenerationSettings, OnRequestsDone, RequestKind
from prunetune.evaluation.suites.suite import Suite, load_suite
from support.data import write_lines
from support.evaluation import characters, speaker

ORGANS = ["heart", "head", "lung", "x"]


def chosen(count: int = 8) -> list[dict[str, Any]]:
    """Rows with choices."""
    return [
        {"prompt": f"Where is case {n}{'!' * (n % 5)} ", "choices": ORGANS, "answer": n % 4, "id": f"c{n}"}
        for n in range(count)
    ]


def open_rows(count: int = 6) -> list[dict[str, Any]]:
    """Rows whose answer is written."""
    return [{"prompt": f"Q{n}{'?' * (n % 4)} ", "completion": f"answer {n}", "id": f"q{n}"} for n in range(count)]


def texts(count: int = 5) -> list[dict[str, Any]]:
    """Rows of text, with letters that take more than a byte."""
    return [{"text": "the quick föx " * (1 + n % 3) + str(n), "id": f"t{n}"} for n in range(count)]


def suite_in(folder: Path, tasks: Any, *, strict: bool = True, **keys: Any) -> Suite:
    """A suite file over chosen.jsonl, open.jsonl and texts.jsonl, written and read."""
    return load_suite(suite_file(folder, tasks, **keys), strict=strict)


def suite_file(folder: Path, tasks: Any, **keys: Any) -> Path:
    """The same file, written but not read."""
    write_lines(folder / "chosen.jsonl", *chosen())
    write_lines(folder / "open.jsonl", *open_rows())
    write_lines(folder / "texts.jsonl", *texts())
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"tasks": tasks, **keys}, sort_keys=False), encoding="utf-8")
    return path


ALL: dict[str, Any] = {
    "organ": {"data": "chosen.jsonl", "scorer": ["accuracy", "macro_f1"]},
    "open": {"data": "open.jsonl", "scorer": ["rouge", "exact_match", "token_f1", "nll"], "max_new_tokens": 6},
    "prose": {"data": "texts.jsonl", "scorer": "perplexity"},
}


def model_folder(folder: Path, **changes: Any) -> Path:
    """A tiny checkpoint with its tokenizer."""
    speaker(**changes).save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


class ScriptedBackend:
    """Generates what a function of the record returns; the right choice is the likeliest, except for ids in `wrong`."""

    def __init__(self, write: Callable[[Record], str] = lambda record: record.completion, wrong: Sequence[str] = ()):
        self.write, self.wrong = write, set(wrong)
        self.name, self.fingerprint, self.calls = "told", "told", 0

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        raise NotImplementedError

    def run_requests(
        self, kind: RequestKind, records: Sequence[Record], settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        self.calls += len(records)
        return [
            {"generate": self.write, "loglikelihood": self._choose, "nll": self._weigh}[kind](record)
            for record in records
        ]

    def _choose(self, record: Record) -> list[list[float]]:
        best = (record.answer + (record.id in self.wrong)) % len(record.choices)
        return [[0.0 if index == best else -1.0, 1] for index in range(len(record.choices))]

    def _weigh(self, record: Record) -> list[float]:
        return [2.0 * len(record.completion), len(record.completion), len(record.completion.encode())]
