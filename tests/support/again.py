"""The recipe of a run of two steps, and a self-check in this process, as fresh ones take seconds to start."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.export.checkpoint import WrittenCheckpoint
from prunetune.export.selfcheck import compute_logits
from prunetune.model.config_checks import auto_class
from prunetune.model.per_layer_classes import register_folder


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
        "evaluate": {"drift": False, "dense_tuned": False, "limit": 4, "generate_limit": 1, "max_new_tokens": 2},
    }
    return from_mapping(values | changes)


class ReaderHere(nullcontext[None]):
    """Replaces `selfcheck.FreshReader`."""

    def __enter__(self) -> Self:
        return self

    def read(self, written: WrittenCheckpoint, tokens: Tensor, **_: Any) -> dict[str, Tensor]:
        register_folder(written.folder)
        auto = auto_class(AutoConfig.from_pretrained(written.folder))
        model = auto.from_pretrained(written.folder, dtype=torch.float32).eval()
        return {"logits": compute_logits(model, tokens), "params": torch.tensor(model.num_parameters())}
