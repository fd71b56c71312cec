"""`budget.quality`: the run ends with the smallest model that keeps it, judged at the end of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.config.recipe import RunConfig, from_mapping, to_mapping
from prunetune.errors import ConfigError, LimitBroken
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.train.schedule import build_schedule, learning_rate
from support.limits import MonitoredRun, config_of, run_with_limits
from support.loop import identical

STEPS = 20


def quality_config(quality: float, keep: float = 0.3, **train: Any) -> RunConfig:
    train = {"steps": STEPS, "validate_every": 100, "weights": "all", "learning_rate": 1e-3} | train
    return config_of(budget={"quality": quality, "keep": keep}, train=train)


def limits_config(limits: dict[str, float], quality: float = 0.0) -> RunConfig:
    named = (
        {"quality": limits}
        if not quality
        else {"quality": quality, "quality_limits": [f"{k}={v}" for k, v in limits.items()]}
    )
    train = {"steps": STEPS, "validate_every": 100, "weights": "all", "learning_rate": 1e-3}
    return config_of(budget={"keep": 0.3, **named}, train=train)


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


@pytest.mark.parametrize("limits", [{"accuracy": 0.65}, {"nll": 1.35}, {"nll": 1.35, "accuracy": 0.2}])
def test_absolute_limits_end_a_run_at_the_same_stage_as_a_share_of_the_same_size(
    limits: dict[str, float], tmp_path: Path
) -> None:
    """The monitor's accuracy is the share kept, and its loss one more than the share removed."""
    share = run_with_limits(quality_config(0.65), tmp_path / "share")
    absolute = run_with_limits(limits_config(limits), tmp_path / "absolute")
    assert removed(absolute) == removed(share)
    assert absolute.plan == share.plan
    name, (event,) = next(iter(limits)), absolute.history["events"]
    assert f"; {name} of the smaller model: " in event["did"]


def test_run_holds_the_stricter_of_a_share_and_an_absolute_limit(tmp_path: Path) -> None:
    loose, strict = run_with_limits(quality_config(0.4), tmp_path / "loose"), quality_config(0.65)
    for name, config in (
        ("a", limits_config({"accuracy": 0.65}, quality=0.4)), ("b", limits_config({"accuracy": 0.4}, quality=0.65)),
    ):  # fmt: skip
        both = run_with_limits(config, tmp_path / name)
        assert both.plan == run_with_limits(strict, tmp_path / f"{name}-strict").plan
        assert both.plan != loose.plan


def test_absolute_limit_that_the_first_cut_breaks_leaves_no_smaller_model(tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match=r"no smaller model keeps the quality.*quality\.nll is 1\.\d+ and has to be"):
        run_with_limits(limits_config({"nll": 1.0}), tmp_path)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"triage": 0.6, "nll": 1.3}, ("triage.accuracy=0.6", "nll=1.3")),
        ({"legal/text.nll": 2, "accuracy": 0.5}, ("legal/text.nll=2", "accuracy=0.5")),
    ],
)
def test_mapping_under_quality_is_read_as_limits(written: dict[str, float], read: tuple[str, ...]) -> None:
    config = config_of(budget={"quality": written})
    assert config.budget.quality_limits == read
    assert (config.budget.quality, config.budget.has_quality) == (0.0, True)
    assert from_mapping(to_mapping(config)) == config, "as a run folder keeps it"
    with pytest.raises(ConfigError, match=r"is no limit; write a score and its value such as triage=0\.6"):
        config_of(budget={"quality": {"triage": "good"}})


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
