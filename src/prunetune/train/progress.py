"""Looking on while the loop runs: records, validation, checkpoints, and where to go on from."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from prunetune.cost.parameters import kept_share
from prunetune.search.searcher import Decision, moved_to
from prunetune.train.adapters import adapters
from prunetune.train.checkpoints import State, optimizer_tensors, restore_optimizer
from prunetune.train.job import Job, Record
from prunetune.train.players import Adapters, Search
from prunetune.train.recovery import Faults
from prunetune.train.schedule import Schedule
from prunetune.train.validation import Validation


class Progress:
    """Knows how far the run has come."""

    def __init__(self, job: Job, search: Search, tuning: Adapters, faults: Faults) -> None:
        self.job, self.search, self.tuning, self.faults = job, search, tuning, faults
        self.validation = Validation(job, search, tuning)
        self.step = 0
        self.last: Decision | None = None
        self.gates: Mapping[str, Tensor] = {}  # of the last decision, on the CPU
        self.kept = 1.0
        self.started = time.monotonic()

    @property
    def schedule(self) -> Schedule:
        """The job's own, until a gate moves it."""
        return self.validation.seen.schedule

    def resume(self) -> Decision:
        """Go back to the newest whole checkpoint, or to the start; returns the decision that stood there."""
        searcher, state = self.search.searcher, self.job.checkpoints.latest()
        plan = self.job.plan if state is None else state.plan
        if state is not None:
            if state.is_cut and plan is not None:
                self.tuning.shrink(plan)
            self.tuning.load(state.tensors["adapters"], state.tensors["adapter_optimizer"])
            searcher.load(state.tensors["generator"])
            restore_optimizer(self.search.optimizer, searcher.parameter_names(), state.tensors["generator_optimizer"])
            self.faults.restore(state.faults)
            self.step, self.started = state.step, self.started - state.seconds
            if opened := state.tensors.get("decision"):
                self.gates = {name: gate.float() for name, gate in opened.items()}
        self.validation.resume(state)
        return searcher.fixed(plan) if plan else searcher.undecided()

    def done(self, record: Record, decision: Decision) -> None:
        """A step is done: complete its record and tell the observer."""
        job, self.step, before, is_new = self.job, record["step"], self.gates, decision is not self.last
        if is_new:
            self.gates = moved_to(decision.gates, "cpu")  # by one transfer, where a GPU would wait for many small sums
            self.kept = float(kept_share(self.gates, job.sites))
        record["kept"] = self.kept
        record["seconds"] = self._seconds()
        if before and is_new:
            record["changed"] = self._changed(before)
        self.last = decision
        if self._is_worth_widths(record):
            record["widths"] = {name: int(gate.sum()) for name, gate in self.gates.items()}
        job.observer.step(record)

    def validate(self, record: Record, decision: Decision) -> Decision:
        """Score the sub-network decided now, where it is time to; a gate may change what holds from here on."""
        return self.validation.look(record, decision, self._state)

    def save_where_due(self, decision: Decision) -> None:
        """Leave a checkpoint every so often, and where a phase ends."""
        if self.step % self.job.config.train.checkpoint_every == 0 or self.schedule.ends_phase(self.step - 1):
            self.save(decision)

    def save(self, decision: Decision) -> None:
        """Leave a checkpoint of where the run stands."""
        self.job.checkpoints.save(self._state(decision))

    def _seconds(self) -> float:
        """Of this run's steps and what stood between them, those before a resumption too."""
        return time.monotonic() - self.started

    def _changed(self, before: Mapping[str, Tensor]) -> float:
        """Share of all units whose gate moved."""
        moved = torch.cat([self.gates[site.name] != before[site.name] for site in self.job.sites])
        return float(moved.float().mean())

    def _is_worth_widths(self, record: Record) -> bool:
        """While decisions move, every few steps: what a picture of them over time needs."""
        return record["phase"] == "search" and (self.step == 1 or self.step % self.job.config.train.log_every == 0)

    def _state(self, decision: Decision) -> State:
        named, searcher = adapters(self.job.model), self.search.searcher
        tensors = {
            "adapters": {name: parameter.detach() for name, parameter in named.items()},
            "adapter_optimizer": optimizer_tensors(self.tuning.optimizer, list(named)),
            "generator": searcher.tensors(),
            "generator_optimizer": optimizer_tensors(self.search.optimizer, searcher.parameter_names()),
        }
        if self.gates and decision.plan is None:
            tensors["decision"] = {name: gate.bool() for name, gate in self.gates.items()}
        seen, faults = self.validation.seen.to_dict(), self.faults.to_dict()
        return State(self.step, decision.plan, self.tuning.is_cut, tensors, seen, faults, self._seconds())
