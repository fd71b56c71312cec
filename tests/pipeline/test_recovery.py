"""Runs whose disk fills up or whose tracker fails: nothing is lost, and a resumed run ends the same."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.pipeline import recording
from prunetune.pipeline.run import run
from prunetune.runs import trackers
from prunetune.train import checkpoints
from prunetune.train.checkpoints import Checkpoints
from prunetune.utils import files
from prunetune.utils.failures import is_disk_full
from prunetune.utils.files import write_text
from support.data import write_lines
from support.evaluation import characters, speaker

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.6, "align": 8},
    "train": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "validate_every": 3},
    "lora": {"rank": 4},
    "search": {"cuts": 2, "span": 0.4, "init_batches": 1, "batch_size": 4},
    "distill": {"teacher": "none"},
    "evaluate": {"drift": False, "limit": 4, "generate_limit": 0, "dense_tuned": False},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    speaker().save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    write_lines(folder / "rows.jsonl", *({"prompt": f"Say {n}: ", "completion": f"{n}"} for n in range(40)))
    return folder


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    paths = {"model": str(workspace / "dense"), "out": str(out), "data": {"train": [str(workspace / "rows.jsonl")]}}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("plan.json", "model/model.safetensors")}


@pytest.fixture(scope="module")
def whole(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return results(run(config_of(workspace, tmp_path_factory.mktemp("runs") / "whole")))


def full(genuine: Callable[..., Any], after: int) -> Callable[..., Any]:
    """A `save_file` that fails after some calls with half a file and the error of safetensors."""
    count = [0]

    def save(tensors: Any, file: Path) -> None:
        count[0] += 1
        genuine(tensors, file)
        if count[0] > after:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    return save


def test_full_disk_costs_one_checkpoint(
    workspace: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(workspace, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(
            checkpoints, "save_file", full(checkpoints.save_file, after=3)
        )  # in the second checkpoint: 2 files each
        with pytest.raises(SafetensorError) as ended:
            run(config)
    assert is_disk_full(ended.value)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-0000001"]
    state = Checkpoints(folder).latest()
    assert state is not None
    assert state.step == 1
    with monkeypatch.context() as patched:  # now a line of the records, cut short
        genuine = recording.RunFolder.append_record

        def append(self: Any, name: str, record: dict[str, Any]) -> None:
            if (name, record["step"]) == ("metrics.jsonl", 5):
                with (self.path / name).open("a") as file:
                    file.write(json.dumps(record)[:30])
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path / name))
            genuine(self, name, record)

        patched.setattr(recording.RunFolder, "append_record", append)
        with pytest.raises(OSError, match="No space left"):
            run(config, resume=True)
    assert results(run(config, resume=True)) == whole
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 7))


def test_partial_checkpoint_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.json", "old")

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "old"}


class FailingTracker:
    """A tracker whose server is lost from the third call on."""

    name = "down"

    def __init__(self) -> None:
        self.calls = 0

    def log(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        if self.calls >= 3:
            raise ConnectionError("the server is gone")

    def finish(self) -> None:
        raise AssertionError("the broken tracker was not dropped")


def test_failing_tracker_changes_no_result(
    workspace: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = FailingTracker()
    monkeypatch.setattr(trackers, "_start", lambda *_: tracker)
    folder = run(config_of(workspace, tmp_path / "run", track=["tensorboard"]))
    assert tracker.calls == 4  # dropped at the third step's record, and asked once more to take the results
    assert caplog.text.count("the run continues without it") == 2
    assert results(folder) == whole
