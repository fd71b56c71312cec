"""Validation during a run: scores of the sub-network decided so far, the limits on them, and what a broken limit does.

*back-off* raises the budget. *roll-back* makes the last good state the newest checkpoint, its decision frozen, and ends
the loop with `RolledBack`: the caller starts it again, as for any stopped run. *stop* raises `LimitBroken`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prunetune.config.score_limits import STAGE_SCORE, ScoreLimit
from prunetune.errors import LimitBroken
from prunetune.evaluation.statistics import perplexity
from prunetune.plan import Plan
from prunetune.pruning.masking import masked
from prunetune.search.searcher import Searcher
from prunetune.search.select import Decision
from prunetune.train.checkpoints import NullCheckpointStore, TrainingState
from prunetune.train.job import TrainingJob
from prunetune.train.schedule import Schedule
from prunetune.train.weight_trainer import WeightTrainer
from prunetune.utils.json_lines import JsonObject

log = logging.getLogger(__name__)

StateBuilder = Callable[[Decision], TrainingState]


class RolledBack(Exception):
    """The newest checkpoint is now an earlier state with its decision frozen: continue from it with a new model."""


@dataclass(frozen=True)
class ValidationHistory:
    """Scores so far, and what limits changed; part of every checkpoint."""

    schedule: Schedule  # the job's own, until a limit changes it
    dense: Mapping[str, float] = field(default_factory=dict)  # scores before the first step
    last: Mapping[str, float] = field(default_factory=dict)  # newest scores of the current state
    good: JsonObject = field(default_factory=dict)  # "step", "kept" and "scores" of the state to go back to
    stale: int = 0  # validations since one that was better
    events: tuple[JsonObject, ...] = ()  # what broken limits did
    stride: int = 0  # one of so many due validations takes place; 0: not measured yet
    seconds: float = 0.0  # spent on validations

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self) | {"schedule": self.schedule.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ValidationHistory:
        """Read what `to_dict` wrote."""
        return cls(**{**values, "schedule": Schedule.from_dict(values["schedule"]), "events": tuple(values["events"])})


class Validation:
    """Scores the sub-network between steps, checks the limits and acts on broken ones."""

    def __init__(
        self, job: TrainingJob, weight_trainer: WeightTrainer, searcher: Searcher | None, state_of: StateBuilder
    ) -> None:
        self.job, self.weight_trainer, self.searcher, self.state_of = job, weight_trainer, searcher, state_of
        self.limits = job.monitor.limits if job.monitor else ()
        self.keep_best, self.patience = job.config.train.keep_best, job.config.train.patience
        self.good_checkpoints = job.good_checkpoints or NullCheckpointStore()
        self.keeps_states = self.keep_best or any(limit.action != "stop" for limit in self.limits)
        self.ranks_states = self.keep_best or self.patience or job.config.validate.back_to == "best"
        self.history = ValidationHistory(job.schedule)
        # For the pace of a step: steps and seconds before this process; seconds of its validations are added.
        self.first_step, self.excluded_seconds = 0, 0.0

    @property
    def schedule(self) -> Schedule:
        """The job's own, until a limit changes it."""
        return self.history.schedule

    def resume(self, state: TrainingState | None) -> None:
        """Continue a checkpoint's history; before the first step, score the dense model for reference."""
        start = self.job.start_state
        if state is not None:
            self.first_step, self.excluded_seconds = state.step, state.seconds
            if state.validation_history:
                self.history = ValidationHistory.from_dict(state.validation_history)
        elif start is not None and start.validation_history:  # the dense model was scored when the run began
            dense = ValidationHistory.from_dict(start.validation_history).dense
            self.history = replace(self.history, dense=dense, last=dense)
        elif self.job.monitor and self.job.monitor.needs_dense_scores and self.job.valid_examples:
            scores, seconds = self._timed_scores(None)
            self.history = replace(self.history, dense=scores, last=scores)
            self._report({"step": 0, "phase": "dense", "kept": 1.0}, scores, seconds)
        self._set_schedule(self.schedule)

    def validate_if_due(self, record: JsonObject, decision: Decision) -> Decision:
        """Validate at the steps where it is due; returns the decision that holds from here on."""
        step, every, last = record["step"], self.job.config.train.validate_every, self.job.schedule.steps
        if not self.job.valid_examples:
            return decision
        unmeasured = self.job.config.validate.share < 1 and not self.history.stride
        if unmeasured and step == max(1, every // 2) and step != last:
            self._set_stride(record, decision)
            self.job.checkpoints.save(self.state_of(decision))  # measured once: resumed, it validates at the same steps
        elif step % (every * (self.history.stride or 1)) == 0 or step == last or self.schedule.is_judged_after(step):
            return self._validate(record, decision)
        return decision

    def _validate(self, record: JsonObject, decision: Decision) -> Decision:
        is_judged = self.schedule.is_judged_after(record["step"])
        scores, seconds = self._timed_scores(None if self.weight_trainer.is_cut else decision, is_judged=is_judged)
        self.history = replace(self.history, last=scores)
        limits = [limit for limit in self.limits if is_judged or not limit.is_of_stages]
        broken = [limit for limit in limits if not limit.is_met(scores, self.history.dense)]
        fields = {name: record[name] for name in ("step", "phase", "kept")}
        if broken:
            fields["broken"] = [str(limit) for limit in broken]
        self._report(fields, scores, seconds, decision.plan)
        if broken:
            return self._handle_broken_limits(record, broken, decision)
        if is_judged or not self.schedule.is_judged:
            self._save_if_good(record, decision, scores)
        return decision

    def best_state(self, decision: Decision) -> TrainingState | None:
        """With `train.keep_best`, the state of the best validation with the last plan; its scores are now the last."""
        good, best = self.history.good, self.good_checkpoints.latest() if self.keep_best else None
        if not good or best is None or (best.step, best.is_cut, best.plan) != (good["step"], True, decision.plan):
            return None
        log.info("step %d has the lowest valid.nll, %.4g: its weights are kept", best.step, good["scores"]["valid.nll"])
        self.history = replace(self.history, last=good["scores"])
        return best

    # -- what a validation scores, and its price ------------------------------------------------------------------

    def _set_stride(self, record: JsonObject, decision: Decision) -> None:
        """Time one validation, and set how many due ones are skipped to stay below the share `validate.share`."""
        pace = (record["seconds"] - self.excluded_seconds) / (record["step"] - self.first_step)
        _, cost = self._timed_scores(None if self.weight_trainer.is_cut else decision)
        share, every = self.job.config.validate.share, self.job.config.train.validate_every
        # share = cost / (cost + steps * pace), solved for the steps from one validation to the next
        stride = self.job.ranks.broadcast_from_main(max(1, math.ceil(cost * (1 - share) / (share * pace) / every)))
        self.history = replace(self.history, stride=stride)
        log.info("a validation takes %.2f s, a step %.2f s: one takes place every %d steps", cost, pace, stride * every)

    def _timed_scores(self, decision: Decision | None, *, is_judged: bool = False) -> tuple[dict[str, float], float]:
        """Scores of the model as it is or gated by the decision, the same on all ranks; and the seconds they took."""
        started = time.monotonic()
        gates, monitor = decision.gates if decision else None, self.job.monitor
        nll = self.weight_trainer.passes.score(self.job.valid_examples, gates)
        with masked(self.job.model, gates, sites=self.job.sites) if gates else nullcontext():
            monitored = monitor.score(self.job.model, is_judged=is_judged) if monitor else {}
        seconds = time.monotonic() - started
        self.excluded_seconds += seconds
        self.history = replace(self.history, seconds=self.history.seconds + seconds)
        scores = {"valid.nll": nll, "valid.perplexity": perplexity(nll), **monitored}
        return self.job.ranks.broadcast_from_main(scores), seconds

    def _report(
        self, fields: JsonObject, scores: Mapping[str, float], seconds: float, plan: Plan | None = None
    ) -> None:
        record = {**fields, "nll": scores["valid.nll"], **scores, "seconds": seconds}
        self.job.observer.validation(record)
        if self.job.monitor and plan:
            self.job.monitor.record_decision(record, plan)

    # -- what limits do ------------------------------------------------------------------------------------------------

    def _save_if_good(self, record: JsonObject, decision: Decision, scores: Mapping[str, float]) -> None:
        """Keep a state that meets all limits, if the run may go back to it; draws have no plan to keep.

        After `train.patience` validations with the last plan and without a better one, this step is the last.
        """
        if decision.plan is None:
            return
        step, good, is_decided = record["step"], self.history.good, not self.schedule.decides_after(record["step"])
        candidate = {"step": step, "kept": record["kept"], "scores": scores}
        is_first = not good or (is_decided and self.schedule.decides_after(good["step"]))
        if is_first or not self.ranks_states or _is_better(candidate, good):
            self.history = replace(self.history, good=candidate, stale=0)
            if self.keeps_states:
                self.good_checkpoints.save(self.state_of(decision))
            return
        self.history = replace(self.history, stale=self.history.stale + 1)
        smaller_size_waits = self.job.branch_checkpoints is not None and step < self.schedule.branch_step
        if 0 < self.patience <= self.history.stale and is_decided and not smaller_size_waits:
            log.info("step %d: valid.nll has not fallen for %d validations: tuning ends", step, self.history.stale)
            self._set_schedule(replace(self.schedule, steps=step))

    def _handle_broken_limits(self, record: JsonObject, broken: list[ScoreLimit], decision: Decision) -> Decision:
        step, reason = record["step"], broken[0].describe(self.history.last, self.history.dense)
        actions = {limit.action for limit in broken}
        if "stop" in actions:
            self._add_event(step, broken, "stopped")
            raise LimitBroken(
                f"stopped at step {step}: {reason}; raise budget.keep or the limit, and start a new run with --out"
            )
        if "roll-back" not in actions and self.schedule.decides_after(step):
            return self._back_off(step, broken, decision, reason)
        good = self.good_checkpoints.latest() if self.history.good else None
        if good is None and any(limit.is_of_stages for limit in broken):
            self._add_event(step, broken, "nothing to go back to")
            raise LimitBroken(
                f"no smaller model keeps the quality: the first cut leaves {100 * record['kept']:.0f}%, and after "
                f"{step} steps {reason}; ask for a lower quality, give more train.steps, or tune the dense model alone"
            )
        if good is None:
            self._add_event(step, broken, "nothing to go back to")
            log.warning("step %d: %s, and no earlier validation met all limits: the run continues", step, reason)
            return decision
        self._roll_back(step, broken, replace(good, guard_state=self.state_of(decision).guard_state), reason)
        raise RolledBack

    def _back_off(self, step: int, broken: list[ScoreLimit], decision: Decision, reason: str) -> Decision:
        """Raise the budget from here on; a generator's decision that was final is made again."""
        before = self.schedule.allowed_keep
        keep = min(1.0, before + self.job.config.validate.back_off)
        self._add_event(step, broken, f"budget raised from {before:.4g} to {keep:.4g}")
        log.warning("step %d: %s: the budget is raised from %.4g to %.4g", step, reason, before, keep)
        self._set_schedule(replace(self.schedule, allowed_keep=keep))
        return replace(decision, plan=None) if self.searcher else decision

    def _roll_back(self, step: int, broken: list[ScoreLimit], good: TrainingState, reason: str) -> None:
        """Make the good state the newest checkpoint: weights, optimisers, and its decision, which is now final."""
        judged = {limit.metric.removeprefix(STAGE_SCORE): limit.metric for limit in broken if limit.is_of_stages}
        tried = [
            f"; {name.removeprefix('valid.')} of the smaller model: {self.history.last[metric]:.4g}"
            for name, metric in judged.items()
        ]
        self._add_event(step, broken, f"rolled back to step {good.step}{''.join(tried)}")
        kept = 100 * self.history.good["kept"]
        log.warning("step %d: %s: rolled back to step %d, %.1f%% kept", step, reason, good.step, kept)
        schedule = self.schedule.decided_at(step) if self.schedule.decides_after(good.step) else self.schedule
        history = replace(self.history, schedule=schedule, last=self.history.good["scores"])
        self.job.checkpoints.save(replace(good, step=step, validation_history=history.to_dict()))

    def _add_event(self, step: int, broken: list[ScoreLimit], action: str) -> None:
        event = {"step": step, "gates": [str(limit) for limit in broken], "did": action}
        self.history = replace(self.history, events=(*self.history.events, event))

    def _set_schedule(self, schedule: Schedule) -> None:
        """Use this schedule from here on, in the loop and the search."""
        self.history = replace(self.history, schedule=schedule)
        if self.searcher is not None:
            self.searcher.allowed_keep = schedule.allowed_keep


def _is_better(candidate: JsonObject, best: JsonObject) -> bool:
    """Smaller, or as small with a lower loss on valid; shares of one plan differ by rounding only."""
    larger, nll = candidate["kept"] - best["kept"], "valid.nll"
    return bool(larger < -1e-6 or (larger <= 1e-6 and candidate["scores"][nll] < best["scores"][nll]))
