"""Phases of a run, the annealed budget and the learning rate: functions of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from prunetune.config.recipe import RunConfig, TrainConfig

Phase = Literal["search", "settle", "tune"]


@dataclass(frozen=True)
class Schedule:
    """Phases by step: search in [0, search), settle in [search, settle), tune the cut model in [settle, steps)."""

    search: int
    settle: int
    steps: int
    anneal: int  # steps over which the budget falls from dense to `allowed_keep`
    allowed_keep: float  # at the end: as requested, until a limit on scores raises it (back-off)

    def phase_at(self, step: int) -> Phase:
        """The phase of a step (steps count from 0)."""
        if step < self.search:
            return "search"
        return "settle" if step < self.settle else "tune"

    def annealed_keep(self, step: int) -> float:
        """The budget at a step: a straight line from 1 to `allowed_keep`."""
        done = min(1.0, (step + 1) / self.anneal) if self.anneal else 1.0
        return 1 - (1 - self.allowed_keep) * done

    def decided_at(self, step: int) -> Schedule:
        """The same, but the search ends at `step`; settling takes as many steps as planned, if so many are left."""
        return replace(self, search=step, settle=min(self.steps, step + self.settle - self.search))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `allowed_keep` is called `keep` there."""
        return {"keep" if name == "allowed_keep" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """Read what `to_dict` wrote."""
        return cls(**{"allowed_keep" if name == "keep" else name: value for name, value in values.items()})

    def ends_phase(self, step: int) -> bool:
        """Whether the next step, if any, belongs to another phase."""
        return step + 1 in (self.search, self.settle, self.steps)


def build_schedule(config: RunConfig) -> Schedule:
    """The schedule of a one-stage run."""
    steps = config.train.steps
    search = max(1, round(steps * config.search.share))
    settle = min(steps, search + round(steps * config.search.settle))
    return Schedule(search, settle, steps, 0, config.budget.keep)


def tune_only_schedule(config: RunConfig) -> Schedule:
    """The schedule of a run whose plan is given: nothing but tuning."""
    return Schedule(0, 0, config.train.steps, 0, config.budget.keep)


def learning_rate(step: int, config: TrainConfig, peak: float | None = None) -> float:
    """Warm-up to `peak` (default: the adapters'), then decay to `decay_to` of it (cosine, linear) or not at all."""
    peak = config.learning_rate if peak is None else peak
    warm = round(config.warmup * config.steps)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, config.steps - warm)
    if config.decay == "constant":
        return peak
    left = (1 + math.cos(math.pi * done)) / 2 if config.decay == "cosine" else 1 - done
    return peak * (config.decay_to + (1 - config.decay_to) * left)
