"""Laws of the schedule: phases in order, and a learning rate that rises and falls."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest

from prunetune.config.recipe import from_mapping
from prunetune.train.schedule import Schedule, build_schedule, learning_rate, one_cut_schedule

KEEP = 0.6


@pytest.mark.parametrize(("share", "settle"), [(0.4, 0.05), (1.0, 0.0), (0.01, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_schedule_has_phases_in_order(steps: int, share: float, settle: float) -> None:
    search = {"method": "generator", "share": share, "settle": settle}
    recipe = {"budget": {"keep": KEEP}, "train": {"steps": steps}, "search": search}
    schedule = build_schedule(from_mapping(recipe))
    order = ("search", "settle", "tune")
    phases = [schedule.phase_at(step) for step in range(steps)]
    assert phases[0] == "search"
    assert phases == sorted(phases, key=order.index)
    ends = [step for step in range(steps) if schedule.ends_phase(step)]
    assert ends[-1] == steps - 1
    changes = {step for step in range(steps - 1) if phases[step] != phases[step + 1]}
    assert changes | {steps - 1} == set(ends)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("left", [0.0, 0.1, 1.0])
def test_learning_rate_rises_then_falls(decay: str, warmup: float, left: float) -> None:
    given = {"steps": 50, "decay": decay, "decay_to": left, "warmup": warmup, "learning_rate": 2.0}
    train = from_mapping({"train": given}).train
    rates = [learning_rate(step, train) for step in range(50)]
    warm = round(50 * warmup)
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    if warm < 50:
        assert rates[warm] == 2.0
        assert learning_rate(50, train) == pytest.approx(2.0 if decay == "constant" else 2.0 * left)


@pytest.mark.parametrize("generator", [False, True])
def test_schedule_is_saved_with_keep_as_its_key(generator: bool) -> None:
    """Manifests of earlier versions are read by this key."""
    recipe = {"budget": {"keep": KEEP}, "search": {"method": "generator" if generator else "progressive"}}
    schedule = build_schedule(from_mapping(recipe))
    saved = json.loads(json.dumps(schedule.to_dict()))
    assert saved["keep"] == KEEP
    assert Schedule.from_dict(saved) == schedule


# -- progressive removal -----------------------------------------------------------------------------------------------


def schedule_of(steps: int, cuts: int = 4, span: float = 0.2) -> Schedule:
    recipe = {"budget": {"keep": KEEP}, "train": {"steps": steps}, "search": {"cuts": cuts, "span": span}}
    return build_schedule(from_mapping(recipe))


@pytest.mark.parametrize(
    ("steps", "starts"),
    [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (12, [0, 1, 2, 3]), (40, [0, 2, 4, 6]), (700, [0, 35, 70, 105])],
)
def test_default_makes_as_many_cuts_as_fit_from_step_0_on(steps: int, starts: list[int]) -> None:
    schedule = schedule_of(steps)
    assert [cut.step for cut in schedule.cuts] == starts
    phases = [schedule.phase_at(step) for step in range(steps)]
    assert phases == ["prune"] * starts[-1] + ["tune"] * (steps - starts[-1])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 12, 20, 700])
@pytest.mark.parametrize("cuts", [1, 2, 4, 9])
@pytest.mark.parametrize("span", [0.01, 0.2, 0.5, 1.0])
def test_every_cut_removes_an_equal_share_and_is_followed_by_a_step(steps: int, cuts: int, span: float) -> None:
    schedule = schedule_of(steps, cuts, span)
    starts = [cut.step for cut in schedule.cuts]
    assert len(starts) == min(cuts, steps)
    assert starts[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise([*starts, steps]))
    shares = [cut.share for cut in schedule.cuts]
    removed = [later - earlier for earlier, later in itertools.pairwise([0.0, *shares])]
    assert removed == pytest.approx([1 / len(starts)] * len(starts))
    assert shares[-1] == 1.0, "the last meets the budget, to the bit"
    assert schedule.keep_after(schedule.cuts[-1]) == pytest.approx(KEEP)
    assert [schedule.cut_at(step) for step in range(steps) if schedule.cut_at(step)] == list(schedule.cuts)
    stages = [schedule.stage_steps(start) for start in starts]
    assert sum(stages) == steps
    assert all(schedule.ends_phase(start - 1) for start in starts[1:])
    assert [schedule.decides_after(done) for done in range(steps + 1)] == [
        done <= starts[-1] for done in range(steps + 1)
    ]
    assert starts[-1] < schedule.branch_step <= steps


def test_a_smaller_size_starts_where_the_larger_one_ends() -> None:
    schedule = replace(schedule_of(100), start_keep=0.8)
    assert [schedule.keep_after(cut) for cut in schedule.cuts] == pytest.approx([0.75, 0.7, 0.65, 0.6])


def test_schedule_decided_early_makes_no_further_cut() -> None:
    schedule = schedule_of(100).decided_at(7)
    assert not any(schedule.cut_at(step) for step in range(100))
    assert not schedule.decides_after(7)


def test_learning_rate_decays_in_the_shape_that_it_names() -> None:
    def rates(decay: str) -> list[float]:
        given = {"steps": 40, "decay": decay, "decay_to": 0.2, "warmup": 0.0, "learning_rate": 1.0}
        train = from_mapping({"train": given}).train
        return [learning_rate(step, train) for step in (0, 10, 20, 30, 40)]

    assert rates("linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    bend = 0.4 * math.sqrt(0.5)
    assert rates("cosine") == pytest.approx([1.0, 0.6 + bend, 0.6, 0.6 - bend, 0.2])
    assert rates("constant") == [1.0] * 5


def test_given_plan_is_cut_before_the_first_step() -> None:
    schedule = one_cut_schedule(from_mapping({"budget": {"keep": KEEP}, "train": {"steps": 3}}))
    cut = schedule.cut_at(0)
    assert cut is not None
    assert schedule.keep_after(cut) == pytest.approx(KEEP)
    assert [schedule.phase_at(step) for step in range(3)] == ["tune"] * 3


def test_smaller_size_branches_off_when_the_last_cut_was_tuned_as_long_as_the_one_before() -> None:
    assert [cut.step for cut in schedule_of(100).cuts] == [0, 5, 10, 15]
    assert schedule_of(100).branch_step == 20
    assert schedule_of(100, cuts=2, span=1.0).branch_step == 100
    assert schedule_of(5).branch_step == 4
    assert schedule_of(100, cuts=1).branch_step == 100


def test_generator_cuts_once_to_the_budget_when_its_decision_has_settled() -> None:
    search = {"method": "generator", "share": 0.4, "settle": 0.1}
    schedule = build_schedule(from_mapping({"budget": {"keep": KEEP}, "train": {"steps": 50}, "search": search}))
    (cut,) = schedule.cuts
    assert (cut.step, schedule.keep_after(cut)) == (25, pytest.approx(KEEP))
    assert [schedule.stage_steps(step) for step in (0, 24, 25, 49)] == [25] * 4
    assert schedule_of(40).stage_steps(1) == 2
    settled = schedule.decided_at(30)
    assert ([cut.step for cut in settled.cuts], settled.keep_after(settled.cuts[0])) == ([30], pytest.approx(KEEP))
