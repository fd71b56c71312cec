"""The recipe of a run of two steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunetune.config.recipe import RunConfig, from_mapping


def recipe(folder: Path, model: Path, out: str, **changes: Any) -> RunConfig:
    """A run of two steps without a teacher."""
    values = {
        "model": str(model),
        "out": str(folder / out),
        "device": "cpu",
        "dtype": "float32",
        "data": {"train": [str(folder / "rows.jsonl")]},
        "budget": {"keep": 0.8, "align": 8},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-3},
        "search": {"init_batches": 1},
        "distill": {"teacher": "none"},
        "evaluate": {"dense_tuned": False, "limit": 4, "generate_limit": 1, "max_new_tokens": 2},
    }
    return from_mapping(values | changes)
