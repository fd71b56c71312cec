"""When a run cuts, searches and tunes, and the learning rate: functions of the step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from prunetune.config.recipe import RunConfig, TrainConfig
from prunetune.errors import RunFolderError

QUALITY_CUT, QUALITY_SPAN = 0.1, 0.8  # of budget.quality: what a cut removes, and the share of the steps for all cuts
ANNEAL = 0.4  # the last share of a stage that is judged, in which the learning rate falls
Phase = Literal["search", "settle", "prune", "tune"]


@dataclass(frozen=True)
class Cut:
    """A real cut before the step `step`; `share` of all that the run removes is gone after it."""

    step: int
    share: float


@dataclass(frozen=True)
class Schedule:
    """The cuts of a run, and the steps in which a generator searches and its decision settles.

    Progressive removal cuts several times and never searches. A generator (`recipes/paper.yaml`) searches in
    [0, search), settles in [search, settle) and cuts once, at `settle`.
    """

    steps: int
    cuts: tuple[Cut, ...]
    allowed_keep: float  # left after the last cut: as requested, until a limit on scores raises it (back-off)
    start_keep: float = 1.0  # before the first cut; less where a smaller size goes on from a larger one
    search: int = 0
    settle: int = 0
    is_judged: bool = False  # each stage is tuned to its end, and then has to keep `budget.quality`

    def phase_at(self, step: int) -> Phase:
        """The phase of a step (steps count from 0). "prune": more cuts are to come."""
        if step < self.settle:
            return "search" if step < self.search else "settle"
        return "prune" if self.cuts and step < self.cuts[-1].step else "tune"

    def cut_at(self, step: int) -> Cut | None:
        """The cut that comes before a step, if any."""
        return next((cut for cut in self.cuts if cut.step == step), None)

    def is_judged_after(self, steps: int) -> bool:
        """Whether a stage that has to keep its quality ends when so many steps are done."""
        return self.is_judged and (self.cut_at(steps) is not None or steps == self.steps) and steps > 0

    def stage_share(self, step: int) -> float:
        """How far through its stage a step is, in [0, 1): from the cut before it to the one after, or to the end."""
        first = max((cut.step for cut in self.cuts if cut.step <= step), default=0)
        return (step - first) / self.stage_steps(step)

    def stage_steps(self, step: int) -> int:
        """The steps between the cuts around this one: how long the model has the shape that it has there."""
        first = max((cut.step for cut in self.cuts if cut.step <= step), default=0)
        return next((cut.step for cut in self.cuts if cut.step > step), self.steps) - first

    def keep_after(self, cut: Cut) -> float:
        """The share of the prunable parameters that a cut may leave."""
        return self.start_keep - (self.start_keep - self.allowed_keep) * cut.share

    @property
    def branch_step(self) -> int:
        """The step from which a smaller size goes on: the last cut has been tuned as long as those before."""
        if len(self.cuts) < 2:
            return self.steps
        return min(self.steps, 2 * self.cuts[-1].step - self.cuts[-2].step)

    def ends_phase(self, step: int) -> bool:
        """Whether a cut, another phase or the end comes after a step."""
        return step + 1 in (self.search, self.settle, self.steps, *(cut.step for cut in self.cuts))

    def decides_after(self, steps: int) -> bool:
        """Whether a cut is still to be made when so many steps are done."""
        return bool(self.cuts) and self.cuts[-1].step >= steps

    def decided_at(self, step: int) -> Self:
        """The same, but decided by `step`: no further cut, or a generator's once its decision has settled."""
        return replace(self, cuts=(Cut(max(step, self.settle), 1.0),) if self.settle else ())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `allowed_keep` is called `keep` there."""
        return {"keep" if name == "allowed_keep" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; raises `RunFolderError` for a schedule of version 0.1, which decided otherwise."""
        if "cuts" not in values:
            raise RunFolderError(
                "the run was begun by version 0.1, which decided otherwise: finish it there, or start anew with --out"
            )
        fields = {"allowed_keep" if name == "keep" else name: value for name, value in values.items()}
        return cls(**{**fields, "cuts": tuple(Cut(**cut) for cut in values["cuts"])})


def build_schedule(config: RunConfig) -> Schedule:
    """The schedule of a run that decides itself what to remove.

    `search.cuts` cuts remove equal shares, spread evenly from step 0 over `search.span` of the steps. A short run makes
    as many as it has steps, so that each is followed by a step at least. Under `budget.quality` a cut removes a tenth
    of all, and has time to recover: cuts are spread over four fifths of the steps.
    """
    steps, search, keep = config.train.steps, config.search, config.budget.keep
    if search.method == "generator":
        end = max(1, round(steps * search.share))
        settle = min(steps, end + round(steps * search.settle))
        return Schedule(steps, (Cut(settle, 1.0),), keep, search=end, settle=settle)
    count, share = search.cuts, search.span
    if config.budget.has_quality:
        count, share = math.ceil((1 - keep) / QUALITY_CUT - 1e-9), QUALITY_SPAN
    count = max(1, min(count, steps))
    span = min(steps, max(count, round(steps * share)))
    cuts = tuple(Cut(index * span // count, (index + 1) / count) for index in range(count))
    return Schedule(steps, cuts, keep, is_judged=config.budget.has_quality)


def one_cut_schedule(config: RunConfig) -> Schedule:
    """The schedule of a run whose plan is given: one cut, then tuning."""
    return Schedule(config.train.steps, (Cut(0, 1.0),), config.budget.keep)


def learning_rate(step: int, config: TrainConfig, peak: float | None = None, schedule: Schedule | None = None) -> float:
    """Warm-up to `peak` (default: the adapters'), then decay to `decay_to` of it (cosine, linear) or not at all.

    Where stages are judged, the rate falls in the last part of each instead, so that a model is judged as it would be
    at the end of a run (warmup-stable-decay: Hu et al. 2024, MiniCPM, arXiv 2404.06395, section 4).
    """
    peak = config.learning_rate if peak is None else peak
    warm = round(config.warmup * config.steps)
    if step < warm:
        return peak * (step + 1) / (warm + 1)
    if schedule is not None and schedule.is_judged:
        annealed = max(0.0, (schedule.stage_share(step) - (1 - ANNEAL)) / ANNEAL)
        return peak * (1 - (1 - config.decay_to) * annealed)
    done = (step - warm) / max(1, config.steps - warm)
    if config.decay == "constant":
        return peak
    left = (1 + math.cos(math.pi * done)) / 2 if config.decay == "cosine" else 1 - done
    return peak * (config.decay_to + (1 - config.decay_to) * left)
