"""Laws of the schedule: phases in order, and a learning rate that rises and falls."""

from __future__ import annotations

import pytest

from prunetune.config.recipe import from_mapping
from prunetune.train.schedule import Schedule, build_schedule, learning_rate

KEEP = 0.6


@pytest.mark.parametrize(("share", "settle"), [(0.4, 0.05), (1.0, 0.0), (0.01, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_schedule_has_phases_in_order(steps: int, share: float, settle: float) -> None:
    search = {"share": share, "settle": settle}
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


def test_schedule_is_saved_with_keep_as_its_key() -> None:
    """Checkpoints and manifests of earlier versions are read by this key."""
    schedule = Schedule(search=2, settle=4, steps=8, anneal=1, allowed_keep=0.6)
    assert schedule.to_dict() == {"search": 2, "settle": 4, "steps": 8, "anneal": 1, "keep": 0.6}
    assert Schedule.from_dict(schedule.to_dict()) == schedule
