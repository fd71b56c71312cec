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

from prunetune.config.limits import Gate
from prunetune.errors import GateFailed
from prunetune.plan import Plan
from prunetune.pruning.masking import masked
from prunetune.search.searcher import Decision
from prunetune.train.checkpoints import State
from prunetune.train.job import Job, Record
from prunetune.train.players import Adapters, Search
from prunetune.train.schedule import Schedule

log = logging.getLogger(__name__)

StateOf = Callable[[Decision], State]


class WentBack(Exception):
    """The newest checkpoint is now an earlier state with its decision frozen: go on from there."""


@dataclass(frozen=True)
class Seen:
    """What validations have found and changed so far; part of every checkpoint."""

    schedule: Schedule  # the job's own, as far as no gate moved it
    dense: Mapping[str, float] = field(default_factory=dict)  # scores before the first step
    last: Mapping[str, float] = field(default_factory=dict)  # scores of what the run holds now
    good: Mapping[str, float] = field(default_factory=dict)  # scores, "step" and "kept" of the state to go back to
    events: tuple[Record, ...] = ()  # what gates did
    stride: int = 0  # every how many due validations one takes place; 0: not known yet
    seconds: float = 0.0  # spent on validations

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Seen:
        """Read what `to_dict` wrote."""
        return cls(**{**values, "schedule": Schedule(**values["schedule"]), "events": tuple(values["events"])})


class Validation:
    """Scores, gates, and what gates change; between steps, so that a step itself never knows of them."""

    def __init__(self, job: Job, search: Search, tuning: Adapters) -> None:
        self.job, self.search, self.tuning = job, search, tuning
        self.gates = job.watch.gates if job.watch else ()
        self.returns = any(gate.action != "stop" for gate in self.gates)
        self.seen = Seen(job.schedule)
        self.first, self.spent = 0, 0.0  # steps and seconds before this process, and seconds spent here since

    def resume(self, state: State | None) -> None:
        """Go on with what a checkpoint has seen; before the first step the dense model is scored for reference."""
        if state is not None:
            self.first, self.spent = state.step, state.seconds
            self.seen = Seen.from_dict(state.seen) if state.seen else self.seen
        elif self.job.start is not None and self.job.start.seen:  # the dense model was scored when the run began
            dense = Seen.from_dict(self.job.start.seen).dense
            self.seen = replace(self.seen, dense=dense, last=dense)
        elif self.job.watch and self.job.watch.reference and self.job.valid:
            scores, seconds = self._timed(None)
            self.seen = replace(self.seen, dense=scores, last=scores)
            self._tell({"step": 0, "phase": "dense", "kept": 1.0}, scores, seconds)
        self._follow(self.seen.schedule)

    def look(self, record: Record, decision: Decision, state_of: StateOf) -> Decision:
        """Validate where it is time to; returns the decision that holds from here on."""
        if self._is_for_timing(record["step"]):
            self._set_stride(record, decision)
            self.job.checkpoints.save(state_of(decision))  # measured once: a resumed run validates at the same steps
        elif self._is_due(record["step"]):
            return self._validate(record, decision, state_of)
        return decision

    def _validate(self, record: Record, decision: Decision, state_of: StateOf) -> Decision:
        legal = self._legal(decision)
        scores, seconds = self._timed(None if self.tuning.is_cut else legal)
        self.seen = replace(self.seen, last=scores)
        broken = [gate for gate in self.gates if not gate.holds(scores, self.seen.dense)]
        about = {name: record[name] for name in ("step", "phase", "kept")}
        self._tell(about | ({"broken": [str(gate) for gate in broken]} if broken else {}), scores, seconds, legal.plan)
        if broken:
            return self._act(record, broken, decision, state_of)
        self._remember(record, legal, scores, state_of)
        return decision

    # -- when and what -----------------------------------------------------------------------------------------------

    def _is_due(self, step: int) -> bool:
        every, last = self.job.config.train.validate_every * (self.seen.stride or 1), self.job.schedule.steps
        return bool(self.job.valid) and (step % every == 0 or step == last)

    def _is_for_timing(self, step: int) -> bool:
        config, last = self.job.config, self.job.schedule.steps
        bounded = config.validate.share < 1 and not self.seen.stride and bool(self.job.valid)
        return bounded and step == max(1, config.train.validate_every // 2) and step != last

    def _set_stride(self, record: Record, decision: Decision) -> None:
        """One validation on trial says how many due ones have to be skipped to stay below `validate.share`."""
        pace = (record["seconds"] - self.spent) / (record["step"] - self.first)
        _, cost = self._timed(None if self.tuning.is_cut else self._legal(decision))
        share, every = self.job.config.validate.share, self.job.config.train.validate_every
        # share = cost / (cost + steps * pace), solved for the steps from one validation to the next
        stride = self.job.ranks.agree(max(1, math.ceil(cost * (1 - share) / (share * pace) / every)))
        self.seen = replace(self.seen, stride=stride)
        log.info("a validation takes %.2f s, a step %.2f s: one takes place every %d steps", cost, pace, stride * every)

    def _legal(self, decision: Decision) -> Decision:
        """The decision with its plan. A gate could not go back to a noisy draw: there, the plan of the draw's size."""
        searcher = self.search.searcher
        return decision if decision.plan or (searcher.is_sampled and not self.gates) else searcher.legal(decision)

    def _timed(self, decision: Decision | None) -> tuple[dict[str, float], float]:
        """Scores of the model as it is, or gated as it would be cut; and the seconds that they took."""
        started = time.monotonic()
        gates, watch = decision.gates if decision else None, self.job.watch
        nll = self.tuning.passes.score(self.job.valid, gates)
        with masked(self.job.model, gates, sites=self.job.sites) if gates else nullcontext():
            beside = watch.scores(self.job.model) if watch else {}
        seconds = time.monotonic() - started
        self.spent += seconds
        self.seen = replace(self.seen, seconds=self.seen.seconds + seconds)
        scores = {"valid.nll": nll, "valid.perplexity": perplexity(nll), **beside}
        return self.job.ranks.agree(scores), seconds  # what gates see is the same everywhere, to the bit

    def _tell(self, about: Record, scores: Mapping[str, float], seconds: float, plan: Plan | None = None) -> None:
        record = {**about, "nll": scores["valid.nll"], **scores, "seconds": seconds}
        self.job.observer.validation(record)
        if self.job.watch and plan:
            self.job.watch.decided(record, plan)

    # -- what gates do -----------------------------------------------------------------------------------------------

    def _remember(self, record: Record, legal: Decision, scores: Mapping[str, float], state_of: StateOf) -> None:
        """Keep a state within all gates, where one may have to go back to it."""
        if self.job.watch is None or not self.returns:
            return
        found = {"step": record["step"], "kept": record["kept"], **scores}
        if self.job.config.validate.back_to == "best" and not _is_better(found, self.seen.good):
            return
        self.seen = replace(self.seen, good=found)
        self.job.watch.good.save(state_of(legal))

    def _act(self, record: Record, broken: list[Gate], decision: Decision, state_of: StateOf) -> Decision:
        step, why = record["step"], broken[0].words(self.seen.last, self.seen.dense)
        actions = {gate.action for gate in broken}
        if "stop" in actions:
            self._note(step, broken, "stopped")
            raise GateFailed(
                f"stopped at step {step}: {why}; raise budget.keep or the limit, and start anew with --out"
            )
        if "roll-back" not in actions and not self.tuning.is_cut:
            return self._back_off(step, broken, decision, why)
        good = self.job.watch.good.latest() if self.job.watch and self.seen.good else None
        if good is None:
            self._note(step, broken, "nothing to go back to")
            log.warning("step %d: %s, and no earlier validation was within all gates: the run goes on", step, why)
            return decision
        self._go_back(step, broken, replace(good, faults=state_of(decision).faults), why)
        raise WentBack

    def _back_off(self, step: int, broken: list[Gate], decision: Decision, why: str) -> Decision:
        """More may stay from here on; a decision that stood is made again."""
        before = self.seen.schedule.keep
        keep = min(1.0, before + self.job.config.validate.back_off)
        self._note(step, broken, f"budget raised from {before:.4g} to {keep:.4g}")
        log.warning("step %d: %s: the budget is raised from %.4g to %.4g", step, why, before, keep)
        self._follow(self.seen.schedule.with_keep(keep))
        return replace(decision, plan=None)

    def _go_back(self, step: int, broken: list[Gate], good: State, why: str) -> None:
        """The good state becomes the newest checkpoint: weights, optimisers, and the decision, which now stands."""
        self._note(step, broken, f"rolled back to step {good.step}")
        log.warning("step %d: %s: back to step %d, %.1f%% kept", step, why, good.step, 100 * self.seen.good["kept"])
        schedule = self.seen.schedule if good.is_cut else self.seen.schedule.decided_at(step)
        scores = {name: value for name, value in self.seen.good.items() if name not in ("step", "kept")}
        seen = replace(self.seen, schedule=schedule, last=scores)
        self.job.checkpoints.save(replace(good, step=step, seen=seen.to_dict()))

    def _note(self, step: int, broken: list[Gate], did: str) -> None:
        event = {"step": step, "gates": [str(gate) for gate in broken], "did": did}
        self.seen = replace(self.seen, events=(*self.seen.events, event))

    def _follow(self, schedule: Schedule) -> None:
        """Search and loop go by this schedule from here on."""
        self.seen = replace(self.seen, schedule=schedule)
        self.search.searcher.follow(schedule.keep_at, schedule.keep)


def _is_better(found: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Smaller, or as small with a lower loss on valid; shares of one plan differ by rounding only."""
    if not before or found["kept"] < before["kept"] - 1e-6:
        return True
    return found["kept"] <= before["kept"] + 1e-6 and found["valid.nll"] < before["valid.nll"]


def perplexity(nll: float) -> float:
    """exp, infinite where it would overflow."""
    return math.exp(nll) if nll < 700 else math.inf
