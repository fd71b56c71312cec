"""`budget.quality`: the run ends with the smallest model that keeps it, judged at the end of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.config.recipe import RunConfig
from prunetune.errors import ConfigError, LimitBroken
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.train.schedule import build_schedule, learning_rate
from support.limits import MonitoredRun, config_of, run_with_limits
from support.loop import identical

STEPS = 20


def quality_config(quality: float, keep: float = 0.3, **train: Any) -> RunConfig:
    train = {"steps": STEPS, "validate_every": 100, "weights": "all", "learning_rate": 1e-3} | train
    return config_of(budget={"quality": quality, "keep": keep}, train=train)


def removed(run: MonitoredRun) -> list[float]:
    """The share removed that each stage was judged at."""
    return [round(1 - record["valid.quality"], 6) for record in run.observer.validations if "valid.quality" in record]


def test_run_ends_with_the_smallest_stage_that_keeps_the_quality(tmp_path: Path) -> None:
    run = run_with_limits(quality_config(0.65), tmp_path)
    judged = removed(run)
    broken = next(share for share in judged if share > 0.35)
    kept = max(share for share in judged if share <= 0.35)
    assert judged[: judged.index(broken) + 1] == sorted(judged[: judged.index(broken) + 1])
    assert judged[judged.index(broken) - 1] == kept, "the next stage would not have"
    assert judged[-1] == kept, "and the last step is judged, too"
    assert run.roll_backs == 1
    (event,) = run.history["events"]
    assert event["did"].endswith(f"; quality of the smaller model: {1 - broken:.4g}")
    assert run.history["schedule"]["cuts"] == []


def test_run_that_keeps_the_quality_everywhere_ends_at_the_smallest_size_asked_for(tmp_path: Path) -> None:
    run = run_with_limits(quality_config(0.1), tmp_path)
    assert run.roll_backs == 0
    assert removed(run)[-1] == pytest.approx(0.7, abs=0.05)


def test_run_whose_first_cut_breaks_the_quality_says_that_no_smaller_model_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match=r"no smaller model keeps the quality: the first cut leaves 9\d%"):
        run_with_limits(quality_config(0.999), tmp_path)


def test_validations_within_a_stage_neither_judge_nor_become_the_state_to_go_back_to(tmp_path: Path) -> None:
    run = run_with_limits(quality_config(0.65, validate_every=1), tmp_path)
    ends = {cut.step for cut in build_schedule(quality_config(0.65)).cuts} | {STEPS}
    judged = {record["step"] for record in run.observer.validations if "valid.quality" in record}
    assert judged <= ends
    assert len(run.observer.validations) > len(judged)
    assert run.history["good"]["step"] in judged


class Killed(Exception):
    """As by a kill after a checkpoint."""


def test_run_killed_after_any_checkpoint_and_resumed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = run_with_limits(quality_config(0.65), tmp_path / "whole")

    class Killing(Checkpoints):
        saves = 0

        def save(self, state: TrainingState) -> None:
            super().save(state)
            Killing.saves += 1
            if Killing.saves % 4 == 0:
                raise Killed

    store = Killing(tmp_path / "killed" / "checkpoints")
    for _ in range(100):
        try:
            again = run_with_limits(quality_config(0.65), tmp_path / "killed", store=store)
            break
        except Killed:
            continue
    assert Killing.saves > 4
    assert again.plan == whole.plan
    assert identical(again.weights, whole.weights)


def test_learning_rate_falls_at_the_end_of_every_stage_and_is_whole_at_the_start_of_the_next() -> None:
    config = quality_config(0.9, keep=0.2, steps=100)
    schedule = build_schedule(config)
    rates = [learning_rate(step, config.train, None, schedule) for step in range(100)]
    for cut in schedule.cuts[1:]:
        assert rates[cut.step] == pytest.approx(1e-3)
        assert rates[cut.step - 1] < 0.5e-3
    assert rates[-1] < 0.2e-3


def test_each_cut_removes_a_tenth_at_most_and_the_last_reaches_the_smallest_size() -> None:
    schedule = build_schedule(quality_config(0.9, keep=0.25, steps=700))
    shares = torch.tensor([1.0, *(schedule.keep_after(cut) for cut in schedule.cuts)])
    assert -shares.diff().min() <= 0.1 + 1e-6
    assert shares[-1] == pytest.approx(0.25)


def test_quality_with_what_it_excludes_is_refused() -> None:
    with pytest.raises(ConfigError, match="one size itself"):
        config_of(budget={"quality": 0.9, "keep": 0.8, "sizes": [0.5]})
    with pytest.raises(ConfigError, match="cut by cut"):
        config_of(budget={"quality": 0.9}, search={"method": "generator"})
    with pytest.raises(ConfigError, match=r"set budget\.quality"):
        config_of(budget={"quality_of": ["nll"]})
