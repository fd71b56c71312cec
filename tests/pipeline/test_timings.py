"""Timings of a run include processes that failed or were killed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from prunetune.errors import ModelError
from prunetune.pipeline.monitor import tuning_facts
from prunetune.pipeline.recording import record_timing
from prunetune.runs.folder import TUNING_STAGE, RunFolder
from prunetune.train.checkpoints import Checkpoints, TrainingState


def test_timings_include_processes_that_failed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for error in (KeyboardInterrupt, ModelError):
        with suppress(error), record_timing(folder, TUNING_STAGE):
            raise error
    first = folder.read_manifest().timings[TUNING_STAGE]
    with record_timing(folder, TUNING_STAGE):
        pass
    assert folder.read_manifest().timings[TUNING_STAGE] > first > 0


def test_seconds_of_a_killed_process_come_from_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.update_manifest(timings={TUNING_STAGE: 1.5, "evaluate": 2.0})
    Checkpoints(folder.checkpoints).save(TrainingState(3, seconds=7.0))
    assert tuning_facts(SimpleNamespace(folder=folder)) == {"timings": {TUNING_STAGE: 7.0, "evaluate": 2.0}}  # type: ignore[arg-type]
