"""Looking on while the loop runs: records, validation, checkpoints, and where to go on from."""

from __future__ import annotations

import time

import torch

from prunetune.budget.params import kept_share
from prunetune.decide.decision import Decision
from prunetune.train.adapters import adapters
from prunetune.train.faults import Faults
from prunetune.train.job import Job, Record
from prunetune.train.players import Adapters, Search
from prunetune.train.schedule import Schedule
from prunetune.train.state import State, optimizer_tensors, restore_optimizer
from prunetune.train.validation import Validation


class Progress:
    """Knows how far the run has come."""

    def __init__(self, job: Job, search: Search, tuning: Adapters, faults: Faults) -> None:
        self.job, self.search, self.tuning, self.faults = job, search, tuning, faults
        self.validation = Validation(job, search, tuning)
        self.step = 0
        self.last: Decision | None = None
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
            self.step = state.step
            if opened := state.tensors.get("decision"):
                self.last = Decision({name: gate.float().to(self.search.device) for name, gate in opened.items()})
        self.validation.resume(state)
        return searcher.fixed(plan) if plan else searcher.undecided()

    def done(self, record: Record, decision: Decision) -> None:
        """A step is done: complete its record and tell the observer."""
        job, self.step = self.job, record["step"]
        if decision is not self.last:
            self.kept = float(kept_share(decision.gates, job.sites))
        record["kept"] = self.kept
        record["seconds"] = time.monotonic() - self.started
        if self.last is not None and self.last is not decision:
            record["changed"] = self._changed(self.last, decision)
        self.last = decision
        if self._is_worth_widths(record):
            record["widths"] = self._widths(decision)
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

    def _changed(self, before: Decision, after: Decision) -> float:
        """Share of all units whose gate moved."""
        moved = torch.cat([after.gates[site.name] != before.gates[site.name] for site in self.job.sites])
        return float(moved.float().mean())

    def _is_worth_widths(self, record: Record) -> bool:
        """While decisions move, every few steps: what a picture of them over time needs."""
        return record["phase"] == "search" and (self.step == 1 or self.step % self.job.config.train.log_every == 0)

    def _widths(self, decision: Decision) -> dict[str, int]:
        """Units under open gates at each site, by one transfer."""
        counts = torch.stack([gate.sum() for gate in decision.gates.values()]).tolist()
        return {name: round(count) for name, count in zip(decision.gates, counts, strict=True)}

    def _state(self, decision: Decision) -> State:
        named, searcher = adapters(self.job.model), self.search.searcher
        tensors = {
            "adapters": {name: parameter.detach() for name, parameter in named.items()},
            "adapter_optimizer": optimizer_tensors(self.tuning.optimizer, list(named)),
            "generator": searcher.tensors(),
            "generator_optimizer": optimizer_tensors(self.search.optimizer, searcher.parameter_names()),
        }
        if self.last is not None and decision.plan is None:
            tensors["decision"] = {name: gate.bool() for name, gate in self.last.gates.items()}
        seen, faults = self.validation.seen.to_dict(), self.faults.to_dict()
        return State(self.step, decision.plan, self.tuning.is_cut, tensors, seen, faults)
