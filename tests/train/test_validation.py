"""Laws of validation and limits: validation changes no weight, a broken limit acts, a run resumes exactly."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunetune.errors import LimitBroken
from prunetune.pruning.units import kept_params, prunable_params
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.train.loop import tune_and_prune
from prunetune.train.validation import RolledBack
from support.limits import config_of, guard_nll, job_of, run_with_limits
from support.loop import RecordingObserver, identical

METHODS: dict[str, dict[str, Any]] = {"progressive": {}, "generator": {"method": "generator", "offset": 1.0}}
both_methods = pytest.mark.parametrize("method", METHODS)
BACK = "guard.nll <= 0.4 -> roll-back"  # of what is closed: crossed on the way to 0.4 kept


def test_validation_changes_no_weight(tmp_path: Path) -> None:
    config = config_of(lora={"dropout": 0.1})
    alone = run_with_limits(config, tmp_path / "a", monitored=False)
    monitored = run_with_limits(
        config, tmp_path / "b", "guard.nll <= 9 -> roll-back", "valid.nll <= 99 -> stop", score=guard_nll
    )
    assert monitored.plan == alone.plan
    assert identical(monitored.weights, alone.weights)
    assert [record["loss"] for record in monitored.observer.steps] == [
        record["loss"] for record in alone.observer.steps
    ]
    assert [record["step"] for record in alone.observer.validations] == list(range(1, 13))
    assert [record["step"] for record in monitored.observer.validations] == list(range(13)), "the dense model first"
    assert monitored.observer.validations[0]["kept"] == 1.0


def test_validated_decisions_are_recorded_with_their_plans(tmp_path: Path) -> None:
    run = run_with_limits(config_of(), tmp_path, "valid.nll <= 99 -> stop")
    assert sorted(run.monitor.plans) == list(range(1, 13))
    assert run.monitor.plans[12] == run.plan
    for step, record in zip(range(1, 13), run.observer.validations[1:], strict=True):
        share = kept_params(run.job.sites, run.monitor.plans[step]) / prunable_params(run.job.sites)
        assert record["kept"] == pytest.approx(share, abs=1e-6)


def test_roll_back_ends_within_the_limit_that_the_same_run_breaks(tmp_path: Path) -> None:
    config = config_of()
    free = run_with_limits(config, tmp_path / "free", "guard.nll <= 99 -> stop")
    limited = run_with_limits(config, tmp_path / "held", BACK)
    assert free.observer.validations[-1]["guard.nll"] > 0.4
    assert limited.observer.validations[-1]["guard.nll"] <= 0.4
    assert limited.roll_backs >= 1
    event = limited.history["events"][0]
    assert event["did"].startswith("rolled back to step ")
    target = int(event["did"].rpartition(" ")[2])
    assert limited.plan == limited.monitor.plans[target], "the decision stands as it was"
    assert kept_params(limited.job.sites, limited.plan) > 0.4 * prunable_params(limited.job.sites)
    phases = [record["phase"] for record in limited.observer.steps]
    assert phases[event["step"] :] == ["tune"] * (12 - event["step"]), "no further cut"
    kept = [record["kept"] for record in limited.observer.steps]
    assert (target, event["step"]) == (4, 5), "the third cut broke the limit"
    assert kept[5:] == [pytest.approx(kept[3])] * 7
    assert [record["step"] for record in limited.observer.steps] == list(range(1, 13)), "no step is done again"


def test_roll_back_restores_weights_and_moments_of_that_step(tmp_path: Path) -> None:
    class RecordingCheckpoints(Checkpoints):
        """Checkpoints that also keep every saved state in memory."""

        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.saved: list[TrainingState] = []

        def save(self, state: TrainingState) -> None:
            tensors = {
                group: {n: t.detach().clone() for n, t in named.items()} for group, named in state.tensors.items()
            }
            self.saved.append(replace(state, tensors=tensors))
            super().save(state)

    store = RecordingCheckpoints(tmp_path / "checkpoints")
    limited = run_with_limits(config_of(), tmp_path, BACK, store=store)
    event = limited.history["events"][0]
    target = int(event["did"].rpartition(" ")[2])
    earlier = next(state for state in store.saved if state.step == target)
    back = next(state for state in store.saved if state.step == event["step"])
    assert all(identical(earlier.tensors[group], tensors) for group, tensors in back.tensors.items())
    assert set(earlier.tensors) == set(back.tensors)
    assert back.plan == limited.plan
    assert back.validation_history["last"]["guard.nll"] <= 0.4


def test_roll_back_after_the_cut_restores_removed_units(tmp_path: Path) -> None:
    """The model has lost the units by then, so the decision is restored in a new one, and cut at once."""
    calls = itertools.count()  # of the dense model, then after every third step; the fourth one breaks the limit
    config = config_of(train={"validate_every": 3}, search={"method": "generator", "share": 0.25, "settle": 0.5})
    limited = run_with_limits(
        config, tmp_path, "guard.nll <= 0.5 -> roll-back", score=lambda _: float(next(calls) == 4)
    )
    assert [event["did"] for event in limited.history["events"]] == ["rolled back to step 9"]
    assert limited.plan == limited.monitor.plans[9]


def test_search_of_a_generator_has_no_state_to_roll_back_to(tmp_path: Path) -> None:
    """Its draws are noise; only a decision that is final is kept."""
    config = config_of(search=METHODS["generator"], train={"validate_every": 3})
    run = run_with_limits(config, tmp_path, "guard.nll <= 0 -> roll-back", score=lambda _: 1.0)
    assert {event["did"] for event in run.history["events"]} == {"nothing to go back to"}
    assert min(run.monitor.plans) > 6


def test_best_state_is_the_smallest_then_the_best_on_valid(tmp_path: Path) -> None:
    config = config_of(validate={"back_to": "best"}, train={"steps": 16})
    limited = run_with_limits(config, tmp_path, BACK)
    good = limited.history["good"]
    inside = [record for record in limited.observer.validations[1:] if record["guard.nll"] <= 0.4]
    smallest = min(record["kept"] for record in inside)
    best = min((record for record in inside if record["kept"] <= smallest + 1e-6), key=lambda record: record["nll"])
    assert (good["step"], good["scores"]["valid.nll"]) == (best["step"], best["nll"])


def test_back_off_raises_what_later_cuts_leave(tmp_path: Path) -> None:
    calls = itertools.count()  # of the dense model, then after every step

    def score(_: Any) -> float:
        return float(next(calls) == 3)

    config = config_of(validate={"back_off": 0.2})
    limited = run_with_limits(config, tmp_path, "guard.nll <= 0.5 -> back-off", score=score)
    assert [event["step"] for event in limited.history["events"]] == [3]
    assert limited.history["schedule"]["keep"] == pytest.approx(0.6)
    total, plans = prunable_params(limited.job.sites), limited.monitor.plans
    kept = [kept_params(limited.job.sites, plans[step]) / total for step in (1, 3, 5, 7)]
    for share, most in zip(kept, (0.85, 0.7, 0.7, 0.6), strict=True):
        assert most - 0.05 < share <= most
    assert plans[5] == plans[3], "what the third cut may leave is left already"
    assert limited.plan == plans[7] != plans[5]


def test_back_off_after_the_last_cut_rolls_back(tmp_path: Path) -> None:
    """What is cut does not come back, so a limit on what is removed is met only by an earlier state."""
    limited = run_with_limits(config_of(validate={"back_off": 0.3}), tmp_path, "guard.nll <= 0.5 -> back-off")
    assert [event["did"] for event in limited.history["events"]] == ["rolled back to step 6"]
    assert limited.plan == limited.monitor.plans[6]
    assert limited.observer.validations[-1]["guard.nll"] <= 0.5


def test_back_off_raises_the_budget_of_a_generator_until_the_limit_is_met(tmp_path: Path) -> None:
    config = config_of(validate={"back_off": 0.1}, search=METHODS["generator"])
    limited = run_with_limits(config, tmp_path, "guard.nll <= 0.4 -> back-off")
    raised = [event for event in limited.history["events"] if event["did"].startswith("budget raised")]
    assert raised
    keep = limited.history["schedule"]["keep"]
    assert keep == pytest.approx(min(1.0, 0.4 + 0.1 * len(raised)))
    assert kept_params(limited.job.sites, limited.plan) <= keep * prunable_params(limited.job.sites)
    assert kept_params(limited.job.sites, limited.plan) > 0.4 * prunable_params(limited.job.sites)
    assert limited.observer.validations[-1]["guard.nll"] <= 0.4


def test_back_off_while_settling_decides_again(tmp_path: Path) -> None:
    config = config_of(validate={"back_off": 0.3}, train={"validate_every": 7}, search={"method": "generator"})
    limited = run_with_limits(config, tmp_path, "guard.nll <= 0.4 -> back-off")
    assert limited.history["events"][0]["step"] == 7  # settling since step 6
    assert limited.monitor.plans[12] != limited.monitor.plans[7]
    assert limited.plan == limited.monitor.plans[12]


def test_stop_ends_the_run_at_once_and_again_when_resumed(tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match=r"stopped at step \d+: guard\.nll is 0\.\d+ and has to be at most 0\.4; "):
        run_with_limits(config_of(), tmp_path, "guard.nll <= 0.4 -> stop")
    with pytest.raises(LimitBroken, match="stopped at step") as stopped:
        run_with_limits(config_of(), tmp_path, "guard.nll <= 0.4 -> stop")
    assert stopped.value.exit_code == 1
    assert "\n" not in str(stopped.value)


def test_run_continues_with_a_warning_if_there_is_no_state_to_roll_back_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        limited = run_with_limits(config_of(train={"validate_every": 6}), tmp_path, "guard.nll <= 0 -> roll-back")
    assert [event["did"] for event in limited.history["events"]] == ["nothing to go back to"] * 2
    assert "no earlier validation met all limits" in caplog.text
    assert limited.roll_backs == 0


def test_nan_score_breaks_the_limit(tmp_path: Path) -> None:
    with pytest.raises(LimitBroken, match=r"guard\.nll is nan"):
        run_with_limits(config_of(), tmp_path, "guard.nll <= 2x -> stop", score=lambda _: math.nan)


def test_relative_limit_is_of_the_dense_score(tmp_path: Path) -> None:
    free = run_with_limits(config_of(), tmp_path / "a", "guard.nll <= 99 -> stop", score=guard_nll)
    dense = free.observer.validations[0]["guard.nll"]
    worst = max(record["guard.nll"] for record in free.observer.validations)
    run_with_limits(config_of(), tmp_path / "b", f"guard.nll <= {1.001 * worst / dense}x -> stop", score=guard_nll)
    if worst > 1.01 * dense:
        with pytest.raises(LimitBroken):
            run_with_limits(
                config_of(), tmp_path / "c", f"guard.nll <= {0.999 * worst / dense}x -> stop", score=guard_nll
            )


# -- resuming --------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a kill of the process."""


class KilledObserver(RecordingObserver):
    """An observer that raises `Killed` after a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.last = step

    def step(self, record: dict[str, Any]) -> None:
        super().step(record)
        if record["step"] == self.last:
            raise Killed


@both_methods
@pytest.mark.parametrize("gate", [BACK, "guard.nll <= 0.4 -> back-off"])
def test_resumed_after_any_step_equals_uninterrupted(gate: str, method: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"search": METHODS[method], "lora": {"dropout": 0.1}}
    config = config_of(**changes, train={"checkpoint_every": 3})
    whole = run_with_limits(config, tmp_path / "whole", gate)
    assert whole.history["events"]
    first = whole.history["events"][0]["step"]
    for step in (first - 1, first, first + 1):
        folder = tmp_path / f"{step}"
        while True:  # killed once at that step, whatever went back before
            observer = KilledObserver(step)
            store, good = Checkpoints(folder / "checkpoints"), Checkpoints(folder / "good")
            job = job_of(config, observer, store, whole.monitor, good)
            try:
                tune_and_prune(job)
            except Killed:
                break
            except RolledBack:
                continue
        resumed = run_with_limits(config, folder, gate)
        assert resumed.plan == whole.plan
        assert identical(resumed.weights, whole.weights), step
        known = {name: value for name, value in whole.history.items() if name != "seconds"}
        assert {name: value for name, value in resumed.history.items() if name != "seconds"} == known
        shutil.rmtree(folder)


# -- share of the time -----------------------------------------------------------------------------------------------


def test_validate_share_skips_validations_except_the_last(tmp_path: Path) -> None:
    config = config_of(validate={"share": 1e-6}, train={"validate_every": 2})
    run = run_with_limits(config, tmp_path, "valid.nll <= 99 -> stop")
    assert [record["step"] for record in run.observer.validations] == [0, 12]
    assert run.history["stride"] > 6
    generous = run_with_limits(config_of(validate={"share": 0.999999}, train={"validate_every": 2}), tmp_path / "b")
    assert [record["step"] for record in generous.observer.validations][-1] == 12
    assert generous.history["stride"] == 1


def test_resumed_run_keeps_the_measured_stride(tmp_path: Path) -> None:
    config = config_of(
        validate={"share": 1e-6}, train={"validate_every": 2, "checkpoint_every": 100}, search={"cuts": 1}
    )
    with pytest.raises(Killed):
        tune_and_prune(job_of(config, KilledObserver(3), Checkpoints(tmp_path / "checkpoints"), None))
    before = Checkpoints(tmp_path / "checkpoints").latest()
    assert before is not None
    assert before.step == 1
    resumed = run_with_limits(config, tmp_path)
    assert resumed.history["stride"] == before.validation_history["stride"]


def test_history_holds_the_seconds_of_validations(tmp_path: Path) -> None:
    run = run_with_limits(config_of(), tmp_path)
    assert run.history["seconds"] == pytest.approx(sum(record["seconds"] for record in run.observer.validations))
