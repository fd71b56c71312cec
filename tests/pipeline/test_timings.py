"""How long a run took, whatever ended its processes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from prunetune.errors import ModelError
from prunetune.pipeline import stages
from prunetune.pipeline.monitor import tuning_facts
from prunetune.runs.folder import TUNING_STAGE, RunFolder
from prunetune.train.checkpoints import Checkpoints, TrainingState


def test_timings_hold_what_ended_early_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for error in (KeyboardInterrupt, ModelError):
        with suppress(error), stages.record_timing(folder, TUNING_STAGE):
            raise error
    first = folder.read_manifest().timings[TUNING_STAGE]
    with stages.record_timing(folder, TUNING_STAGE):
        pass
    assert folder.read_manifest().timings[TUNING_STAGE] > first > 0


def test_a_killed_process_s_seconds_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.update_manifest(timings={TUNING_STAGE: 1.5, "evaluate": 2.0})
    Checkpoints(folder.checkpoints).save(TrainingState(3, seconds=7.0))
    assert tuning_facts(SimpleNamespace(folder=folder)) == {"timings": {TUNING_STAGE: 7.0, "evaluate": 2.0}}  # type: ignore[arg-type]
