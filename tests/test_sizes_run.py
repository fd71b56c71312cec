"""Laws of runs of several sizes: nested, on budget, each gone on with from the one before, to the bit after a kill."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_helpers import write_lines
from evaluate_helpers import characters, speaker
from prunetune import sizes
from prunetune.budget.params import total
from prunetune.config import RunConfig, from_mapping, merged
from prunetune.model.sites import find_sites, kept_params
from prunetune.plan import Plan
from prunetune.train.state import Checkpoints

KEEPS = (0.8, 0.6, 0.5)
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": list(KEEPS), "align": 8},
    "train": {"steps": 10, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "validate_every": 2},
    "lora": {"rank": 4, "dropout": 0.1},
    "search": {"share": 0.3, "settle": 0.1, "evidence": 1, "batch_size": 4},
    "distill": {"teacher": "base"},
    "evaluate": {"limit": 2, "generate_limit": 0, "dense_tuned": False},
    "gain": {"prompt": 8, "generate": 2, "runs": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("place")
    speaker().save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    rows = [{"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(24)]
    rows += [{"prompt": f"Repeat {n}: ", "completion": f"{n} {n}", "task": "open"} for n in range(24)]
    write_lines(folder / "rows.jsonl", *rows)
    return folder


def config_of(place: Path, out: Path, **changes: Any) -> RunConfig:
    own = {"model": str(place / "dense"), "out": str(out), "data": {"train": [str(place / "rows.jsonl")]}}
    return from_mapping(merged(merged(RECIPE, own), changes))


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of three sizes."""
    return sizes.run(config_of(place, tmp_path_factory.mktemp("runs") / "three"), command="prunetune run")


def of(run: Path, keep: float) -> Path:
    return run / "sizes" / f"{keep:g}"
