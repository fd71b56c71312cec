"""The history of a pruned model: one entry for each run that pruned it, in a file of its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prunetune.model.loading import cached_hub_file
from prunetune.utils.failures import reading_model_files
from prunetune.utils.files import expand_path
from prunetune.utils.untrusted import parse_json

HISTORY_FILE = "history.json"

KINDS = {"model": str, "layout": str, "kept": float, "params": int, "steps": int, "recipe_sha256": str}


@dataclass(frozen=True)
class PruningRun:
    """One run that pruned a model."""

    model: str  # that it began with, as its recipe names it
    layout: str
    kept: float  # share of the prunable parameters of that model
    params: int  # of the result
    steps: int
    recipe_sha256: str = ""


def read_history(model: str) -> tuple[PruningRun, ...]:
    """The runs that made a model, the first one first; none of a model that no run made, and of results of 0.1.

    Raises `ModelError` for a file that does not say so.
    """
    if (file := _local_file(model, HISTORY_FILE)) is None:
        return ()
    with reading_model_files(f"model {model}: {HISTORY_FILE}", "put it back, or remove it"):
        return tuple(
            PruningRun(**{name: kind(run[name]) for name, kind in KINDS.items()})
            for run in parse_json(file.read_bytes())
        )


def has_per_layer_config(model: str) -> bool:
    """Whether the layers of the model differ already; False where it is not in a folder or the cache."""
    file = _local_file(model, "config.json")
    return file is not None and "per_layer_config" in parse_json(file.read_bytes(), nan=True)


def _local_file(model: str, name: str) -> Path | None:
    folder = expand_path(model)
    file = folder / name if folder.is_dir() else cached_hub_file(model, name)
    return file if file and file.is_file() else None


def format_history(runs: Sequence[PruningRun]) -> str:
    """The text of the file."""
    return json.dumps([asdict(run) for run in runs], indent=2) + "\n"
