"""A run with `train.keep_best` and `train.patience` keeps the best validation, and so does its tuned dense model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.pipeline import recording, stages
from prunetune.pipeline import run as run_module
from prunetune.pipeline.run import run
from prunetune.runs.folder import RunFolder
from prunetune.train.checkpoints import Checkpoints
from prunetune.train.validation import Validation
from prunetune.utils.console import SilentConsole
from support.evaluation import write_model_and_rows
from support.loop import identical

BEST, PATIENCE = 7, 2


@pytest.fixture(autouse=True)
def _valley(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss on valid falls up to a step, and rises after it."""

    def scores(validation: Validation, *_: Any, **__: Any) -> tuple[dict[str, float], float]:
        step = validation.job.train_stream.last + 1  # type: ignore[attr-defined]
        return {"valid.nll": 1 + abs(step - BEST) / 10, "valid.perplexity": 1.0}, 0.0

    class Stream(stages.BatchStream):
        def batch_at(self, step: int) -> Any:
            self.last = step
            return super().batch_at(step)

    monkeypatch.setattr(Validation, "_timed_scores", scores)
    monkeypatch.setattr(stages, "BatchStream", Stream)


def config_of(folder: Path) -> RunConfig:
    workspace = write_model_and_rows(folder, 24)
    return from_mapping(
        {
            "model": str(workspace / "dense"),
            "out": str(folder / "run"),
            "device": "cpu",
            "dtype": "float32",
            "data": {"train": str(workspace / "rows.jsonl")},
            "budget": {"align": 8},
            "train": {
                "steps": 14, "batch_size": 2, "validate_every": 1, "keep_best": True, "patience": PATIENCE,
                "learning_rate": 0.01,
            },
            "search": {"init_batches": 1, "cuts": 2},
            "evaluate": {"drift": False, "limit": 2, "generate_limit": 0},
            "lora": {"rank": 4, "dense_rank": 4},
        }
    )  # fmt: skip


def test_run_and_its_dense_teacher_end_at_their_best_validation_and_stop_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("finish", "evaluate_all", "measure"):
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)
    monkeypatch.setattr(recording, "write_report", lambda _: None)
    config = config_of(tmp_path)
    folder = RunFolder(run(config, console=SilentConsole()))
    for last, best in (
        (folder.checkpoints, folder.good_checkpoints),
        (folder.dense_tuned_checkpoints, folder.dense_tuned_checkpoints / "good"),
    ):
        state, good = Checkpoints(last).latest(), Checkpoints(best).latest()
        assert state is not None
        assert good is not None
        assert (state.step, good.step) == (BEST + PATIENCE, BEST)
        assert identical(state.tensors["adapters"], good.tensors["adapters"])
        assert state.validation_history["last"]["valid.nll"] == 1
    steps = [json.loads(line)["step"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, BEST + PATIENCE + 1))
