"""A finished run on a tiny model with a chat template, made once a process; tests copy it before they change it."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from prunetune import RunResult, run
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import from_mapping
from prunetune.export import selfcheck
from support.again import ReaderHere
from support.data import pairs, subwords, write_lines
from support.models import tiny

FOLDER = tempfile.TemporaryDirectory(prefix="prunetune-finished-run-")


def recipe_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Write a model folder and rows; the recipe of a run of two steps on them, with a dense tuned model."""
    subwords().save_pretrained(folder / "dense")
    tiny(vocab_size=320, max_position_embeddings=256).save_pretrained(folder / "dense")
    choices = [
        {"prompt": f"Case {n}: ", "choices": [" yes", " no"], "answer": n % 2, "task": "choice"} for n in range(12)
    ]
    write_lines(folder / "secret-rows.jsonl", *choices, *pairs(12, task="open"))
    values = {
        "model": str(folder / "dense"),
        "out": str(folder / "run"),
        "device": "cpu",
        "dtype": "float32",
        "data": {"train": [str(folder / "secret-rows.jsonl")], "test_share": 0.3},
        "budget": {"keep": 0.7, "align": 8},
        "train": {"steps": 2, "batch_size": 2},
        "search": {"init_batches": 1, "cuts": 1},
        "distill": {"teacher": "none"},
        "require": {"prompt": 8, "generate": 2, "runs": 2},
        "evaluate": {"drift": False, "limit": 4, "generate_limit": 1, "max_new_tokens": 2},
    }
    return merge_mappings(values, changes)


@cache
def finished_run() -> RunResult:
    """The run; its folder is removed when the process ends."""
    before = selfcheck.FreshReader
    selfcheck.FreshReader = ReaderHere  # type: ignore[assignment]  # a fresh process takes seconds
    try:
        return run(from_mapping(recipe_of(Path(FOLDER.name))))
    finally:
        selfcheck.FreshReader = before


def copied_run(folder: Path) -> RunResult:
    """A copy of the run to change."""
    return RunResult(shutil.copytree(finished_run(), folder / "run", symlinks=True))
