"""What a run finds out about itself: every so often the sub-network decided then is scored, and held against gates.

A gate that is crossed acts here. *back-off* raises the budget; *roll-back* leaves the last good state as the newest
checkpoint, its decision frozen, and ends the loop with `WentBack`: whoever started it starts it again, as for any
stopped run; *stop* raises `GateFailed`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prunetune.config.score_limits import ScoreLimit
from prunetune.errors import LimitBroken
from prunetune.plan import Plan
from prunetune.pruning.masking import masked
from prunetune.search.searcher import Decision
from prunetune.train.checkpoints import TrainingState
from prunetune.train.job import StepRecord, TrainingJob
from prunetune.train.schedule import Schedule
from prunetune.train.trainers import AdapterTrainer, GeneratorTrainer

log = logging.getLogger(__name__)

StateBuilder = Callable[[Decision], TrainingState]


class RolledBack(Exception):
    """The newest checkpoint is now an earlier state with its decision frozen: go on from there."""


@dataclass(frozen=True)
class ValidationHistory:
    """What validations have found and changed so far; part of every checkpoint."""

    schedule: Schedule  # the job's own, as far as no gate moved it
    dense: Mapping[str, float] = field(default_factory=dict)  # scores before the first step
    last: Mapping[str, float] = field(default_factory=dict)  # scores of what the run holds now
    good: Mapping[str, float] = field(default_factory=dict)  # scores, "step" and "kept" of the state to go back to
    events: tuple[StepRecord, ...] = ()  # what gates did
    stride: int = 0  # every how many due validations one takes place; 0: not known yet
    seconds: float = 0.0  # spent on validations

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self) | {"schedule": self.schedule.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ValidationHistory:
        """Read what `to_dict` wrote."""
        return cls(**{**values, "schedule": Schedule.from_dict(values["schedule"]), "events": tuple(values["events"])})


class Validation:
    """Scores, gates, and what gates change; between steps, so that a step itself never knows of them."""

    def __init__(self, job: TrainingJob, generator_trainer: GeneratorTrainer, adapter_trainer: AdapterTrainer) -> None:
        self.job, self.generator_trainer, self.adapter_trainer = job, generator_trainer, adapter_trainer
        self.limits = job.monitor.limits if job.monitor else ()
        self.can_roll_back = any(gate.action != "stop" for gate in self.limits)
        self.history = ValidationHistory(job.schedule)
        self.first, self.spent = 0, 0.0  # steps and seconds before this process, and seconds spent here since

    def resume(self, state: TrainingState | None) -> None:
        """Go on with what a checkpoint has seen; before the first step the dense model is scored for reference."""
        if state is not None:
            self.first, self.spent = state.step, state.seconds
            self.history = (
                ValidationHistory.from_dict(state.validation_history) if state.validation_history else self.history
            )
        elif (
            self.job.start_state is not None and self.job.start_state.validation_history
        ):  # the dense model was scored when the run began
            dense = ValidationHistory.from_dict(self.job.start_state.validation_history).dense
            self.history = replace(self.history, dense=dense, last=dense)
        elif self.job.monitor and self.job.monitor.needs_dense_scores and self.job.valid_examples:
            scores, seconds = self._timed_scores(None)
            self.history = replace(self.history, dense=scores, last=scores)
            self._report({"step": 0, "phase": "dense", "kept": 1.0}, scores, seconds)
        self._set_schedule(self.history.schedule)

    def validate_if_due(self, record: StepRecord, decision: Decision, state_of: StateBuilder) -> Decision:
        """Validate where it is time to; returns the decision that holds from here on."""
        if self._is_for_timing(record["step"]):
            self._set_stride(record, decision)
            self.job.checkpoints.save(state_of(decision))  # measured once: a resumed run validates at the same steps
        elif self._is_due(record["step"]):
            return self._validate(record, decision, state_of)
        return decision

    def _validate(self, record: StepRecord, decision: Decision, state_of: StateBuilder) -> Decision:
        legal = self._with_plan(decision)
        scores, seconds = self._timed_scores(None if self.adapter_trainer.is_cut else legal)
        self.history = replace(self.history, last=scores)
        broken = [gate for gate in self.limits if not gate.is_met(scores, self.history.dense)]
        about = {name: record[name] for name in ("step", "phase", "kept")}
        self._report(
            about | ({"broken": [str(gate) for gate in broken]} if broken else {}), scores, seconds, legal.plan
        )
        if broken:
            return self._handle_broken_limits(record, broken, decision, state_of)
        self._save_if_good(record, legal, scores, state_of)
        return decision

    # -- when and what -----------------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        every, last = self.job.config.train.validate_every * (self.history.stride or 1), self.job.schedule.steps
        return bool(self.job.valid_examples) and (step % every == 0 or step == last)

    def _is_for_timing(self, step: int) -> bool:
        config, last = self.job.config, self.job.schedule.steps
        bounded = config.validate.share < 1 and not self.history.stride and bool(self.job.valid_examples)
        return bounded and step == max(1, config.train.validate_every // 2) and step != last

    def _set_stride(self, record: StepRecord, decision: Decision) -> None:
        """One validation on trial says how many due ones have to be skipped to stay below `validate.share`."""
        pace = (record["seconds"] - self.spent) / (record["step"] - self.first)
        _, cost = self._timed_scores(None if self.adapter_trainer.is_cut else self._with_plan(decision))
        share, every = self.job.config.validate.share, self.job.config.train.validate_every
        # share = cost / (cost + steps * pace), solved for the steps from one validation to the next
        stride = self.job.ranks.broadcast_from_main(max(1, math.ceil(cost * (1 - share) / (share * pace) / every)))
        self.history = replace(self.history, stride=stride)
        log.info("a validation takes %.2f s, a step %.2f s: one takes place every %d steps", cost, pace, stride * every)

    def _with_plan(self, decision: Decision) -> Decision:
        """The decision with its plan. A gate could not go back to a noisy draw: there, the plan of the draw's size."""
        searcher = self.generator_trainer.searcher
        return (
            decision
            if decision.plan or (searcher.is_sampled and not self.limits)
            else searcher.with_legal_plan(decision)
        )

    def _timed_scores(self, decision: Decision | None) -> tuple[dict[str, float], float]:
        """Scores of the model as it is, or gated as it would be cut; and the seconds that they took."""
        started = time.monotonic()
        gates, watch = decision.gates if decision else None, self.job.monitor
        nll = self.adapter_trainer.passes.score(self.job.valid_examples, gates)
        with masked(self.job.model, gates, sites=self.job.sites) if gates else nullcontext():
            beside = watch.score(self.job.model) if watch else {}
        seconds = time.monotonic() - started
        self.spent += seconds
        self.history = replace(self.history, seconds=self.history.seconds + seconds)
        scores = {"valid.nll": nll, "valid.perplexity": perplexity(nll), **beside}
        return self.job.ranks.broadcast_from_main(scores), seconds  # what gates see is the same everywhere, to the bit

    def _report(self, about: StepRecord, scores: Mapping[str, float], seconds: float, plan: Plan | None = None) -> None:
        record = {**about, "nll": scores["valid.nll"], **scores, "seconds": seconds}
        self.job.observer.validation(record)
        if self.job.monitor and plan:
            self.job.monitor.record_decision(record, plan)

    # -- what gates do -----------------------------------------------------------------------------------------------

    def _save_if_good(
        self, record: StepRecord, legal: Decision, scores: Mapping[str, float], state_of: StateBuilder
    ) -> None:
        """Keep a state within all gates, where one may have to go back to it."""
        if self.job.monitor is None or not self.can_roll_back:
            return
        found = {"step": record["step"], "kept": record["kept"], **scores}
        if self.job.config.validate.back_to == "best" and not _is_better(found, self.history.good):
            return
        self.history = replace(self.history, good=found)
        self.job.monitor.good_checkpoints.save(state_of(legal))

    def _handle_broken_limits(
        self, record: StepRecord, broken: list[ScoreLimit], decision: Decision, state_of: StateBuilder
    ) -> Decision:
        step, why = record["step"], broken[0].describe(self.history.last, self.history.dense)
        actions = {gate.action for gate in broken}
        if "stop" in actions:
            self._note(step, broken, "stopped")
            raise LimitBroken(
                f"stopped at step {step}: {why}; raise budget.keep or the limit, and start anew with --out"
            )
        if "roll-back" not in actions and not self.adapter_trainer.is_cut:
            return self._back_off(step, broken, decision, why)
        good = self.job.monitor.good_checkpoints.latest() if self.job.monitor and self.history.good else None
        if good is None:
            self._note(step, broken, "nothing to go back to")
            log.warning("step %d: %s, and no earlier validation was within all gates: the run goes on", step, why)
            return decision
        self._roll_back(step, broken, replace(good, guard_state=state_of(decision).guard_state), why)
        raise RolledBack

    def _back_off(self, step: int, broken: list[ScoreLimit], decision: Decision, why: str) -> Decision:
        """More may stay from here on; a decision that stood is made again."""
        before = self.history.schedule.allowed_keep
        keep = min(1.0, before + self.job.config.validate.back_off)
        self._note(step, broken, f"budget raised from {before:.4g} to {keep:.4g}")
        log.warning("step %d: %s: the budget is raised from %.4g to %.4g", step, why, before, keep)
        self._set_schedule(self.history.schedule.with_allowed_keep(keep))
        return replace(decision, plan=None)

    def _roll_back(self, step: int, broken: list[ScoreLimit], good: TrainingState, why: str) -> None:
        """The good state becomes the newest checkpoint: weights, optimisers, and the decision, which now stands."""
        self._note(step, broken, f"rolled back to step {good.step}")
        log.warning("step %d: %s: back to step %d, %.1f%% kept", step, why, good.step, 100 * self.history.good["kept"])
        schedule = self.history.schedule if good.is_cut else self.history.schedule.decided_at(step)
        scores = {name: value for name, value in self.history.good.items() if name not in ("step", "kept")}
        seen = replace(self.history, schedule=schedule, last=scores)
        self.job.checkpoints.save(replace(good, step=step, validation_history=seen.to_dict()))

    def _note(self, step: int, broken: list[ScoreLimit], did: str) -> None:
        event = {"step": step, "gates": [str(gate) for gate in broken], "did": did}
        self.history = replace(self.history, events=(*self.history.events, event))

    def _set_schedule(self, schedule: Schedule) -> None:
        """Search and loop go by this schedule from here on."""
        self.history = replace(self.history, schedule=schedule)
        self.generator_trainer.searcher.set_budget(schedule.annealed_keep, schedule.allowed_keep)


def _is_better(found: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Smaller, or as small with a lower loss on valid; shares of one plan differ by rounding only."""
    if not before or found["kept"] < before["kept"] - 1e-6:
        return True
    return found["kept"] <= before["kept"] + 1e-6 and found["valid.nll"] < before["valid.nll"]


def perplexity(nll: float) -> float:
    """exp, infinite where it would overflow."""
    return math.exp(nll) if nll < 700 else math.inf
