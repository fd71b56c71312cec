"""`train.learning_rate: auto`: three rates are tried on a share of the run, and valid chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.compare.run import compare
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping, to_mapping
from prunetune.errors import ConfigError, DataError
from prunetune.pipeline import multi_size, recording, stages
from prunetune.pipeline import run as run_module
from prunetune.pipeline.run import run
from prunetune.plan import Plan
from prunetune.runs.folder import RunFolder
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.train.job import TrainingJob
from support.evaluation import write_model_and_rows

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.6, "align": 8},
    "train": {"steps": 20, "batch_size": 4, "learning_rate": "auto", "checkpoint_every": 1, "validate_every": 10},
    "lora": {"rank": 4},
    "search": {"cuts": 2, "init_batches": 1, "batch_size": 4},
    "distill": {"teacher": "none"},
    "evaluate": {"drift": False, "limit": 2, "generate_limit": 0, "dense_tuned": False},
    "require": {"prompt": 8, "generate": 2, "runs": 1},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_and_rows(tmp_path_factory.mktemp("place"), 24)


def config_of(workspace: Path, out: Path, **changes: Any) -> RunConfig:
    paths = {"model": str(workspace / "dense"), "out": str(out), "data": {"train": [str(workspace / "rows.jsonl")]}}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


@pytest.fixture
def only_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip writing, scoring and timing; tests read checkpoints and manifest."""
    for name in ("finish", "evaluate_all", "measure"):
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)
    for name in ("_finish_and_evaluate", "measure_gain"):
        monkeypatch.setattr(multi_size, name, lambda *_: None)
    monkeypatch.setattr(recording, "write_report", lambda _: None)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """(learning rate, steps) of every job that is trained."""
    seen: list[tuple[float, int]] = []
    genuine = stages.tune_and_prune

    def watched(job: TrainingJob) -> Plan:
        seen.append((job.config.train.learning_rate, job.config.train.steps))
        return genuine(job)

    monkeypatch.setattr(stages, "tune_and_prune", watched)
    return seen


def final_state(folder: Path) -> TrainingState:
    state = Checkpoints(folder / "checkpoints").latest()
    assert state is not None
    return state


def assert_equal(state: TrainingState, other: TrainingState) -> None:
    assert (state.step, state.plan) == (other.step, other.plan)
    for group, tensors in state.tensors.items():
        assert all(torch.equal(tensor, other.tensors[group][name]) for name, tensor in tensors.items())


def test_rate_of_lowest_validation_loss_is_taken_and_the_run_equals_one_that_names_it(
    workspace: Path, tmp_path: Path, only_tuning: None, jobs: list[tuple[float, int]]
) -> None:
    folder = run(config_of(workspace, tmp_path / "auto"))
    chosen = RunFolder(folder).read_manifest().learning_rate
    assert [trial.rate for trial in chosen.trials] == [5e-4, 1e-3, 2e-3]
    best = min(chosen.trials, key=lambda trial: trial.valid_nll or 1e9)
    assert chosen.rate == best.rate
    assert jobs == [(5e-4, 2), (1e-3, 2), (2e-3, 2), (chosen.rate, 20)]
    assert chosen.seconds is not None
    assert chosen.seconds > 0
    assert chosen.description.startswith(f"{chosen.rate:g}: chosen on valid from 0.0005 (")
    assert chosen.description.endswith("(loss after 2 steps each)")
    assert not list(folder.glob("rates/*/checkpoints"))
    named = run(config_of(workspace, tmp_path / "named", train={"learning_rate": chosen.rate}))
    assert_equal(final_state(folder), final_state(named))


def test_run_killed_in_a_trial_repeats_no_finished_one_and_ends_the_same(
    workspace: Path, tmp_path: Path, only_tuning: None, jobs: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config_of(workspace, tmp_path / "whole"))
    jobs.clear()
    plain, left = Checkpoints.save, [True]

    def deadly(store: Checkpoints, state: TrainingState) -> None:
        plain(store, state)
        if left and store.folder.parent.name == "0.001" and state.step == 1:
            left.clear()
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", deadly)
    config = config_of(workspace, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert jobs == [(5e-4, 2), (1e-3, 2)]
    killed = run(config, resume=True)
    assert [rate for rate, steps in jobs if steps == 2] == [5e-4, 1e-3, 1e-3, 2e-3]
    assert_equal(final_state(killed), final_state(whole))
    before, after = (RunFolder(folder).read_manifest().learning_rate for folder in (whole, killed))
    assert (before.rate, before.trials) == (after.rate, after.trials)
    run(config, resume=True)
    assert len([steps for _, steps in jobs if steps == 2]) == 4


def test_sizes_share_one_choice(
    workspace: Path, tmp_path: Path, only_tuning: None, jobs: list[tuple[float, int]]
) -> None:
    folder = run(config_of(workspace, tmp_path / "run", budget={"keep": [0.8, 0.6]}, train={"size_share": 0.2}))
    chosen = RunFolder(folder).read_manifest().learning_rate
    assert jobs == [(5e-4, 2), (1e-3, 2), (2e-3, 2), (chosen.rate, 20), (chosen.rate, 4)]
    for keep in (0.8, 0.6):
        assert RunFolder(folder).size_folder(keep).read_manifest().learning_rate == chosen


def test_diverged_trial_is_not_chosen(
    workspace: Path, tmp_path: Path, only_tuning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = stages.resume_training

    def diverging(context: Any, *arguments: Any) -> bool:
        if context.config.train.learning_rate == 1e-3 and context.config.train.steps == 2:
            raise stages.ModelError("the loss is nan at step 1")
        return genuine(context, *arguments)

    monkeypatch.setattr(stages, "resume_training", diverging)
    chosen = RunFolder(run(config_of(workspace, tmp_path / "run"))).read_manifest().learning_rate
    assert [trial.valid_nll is None for trial in chosen.trials] == [False, True, False]
    assert chosen.rate != 1e-3
    assert "0.001 (not finite)" in chosen.description


def test_auto_is_refused_before_anything_is_written_where_valid_has_no_rows(workspace: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "long " * 50, "completion": "a"})]
    (tmp_path / "long.jsonl").write_text("\n".join(rows))
    data = {"valid": [str(tmp_path / "long.jsonl")], "max_length": 40, "too_long": "drop"}
    with pytest.raises(DataError, match=r"train\.learning_rate auto chooses on valid, and valid has no row"):
        run(config_of(workspace, tmp_path / "run", data=data))
    assert not (tmp_path / "run").exists()


def test_comparison_refuses_auto_and_names_its_own_option(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.learning_rates"):
        compare(config_of(workspace, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_auto_round_trips_and_negative_rates_are_refused() -> None:
    config = from_mapping({"train": {"learning_rate": "auto"}})
    assert from_mapping(to_mapping(config)) == config
    assert from_mapping({"train": {"learning_rate": "2e-3"}}).train.learning_rate == 2e-3
    with pytest.raises(ConfigError, match=r"train\.learning_rate must lie in .* where 0 is auto"):
        from_mapping({"train": {"learning_rate": -1}})
