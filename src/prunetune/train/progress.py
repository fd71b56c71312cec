"""Looking on while the loop runs: records, validation, checkpoints, and where to go on from."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from prunetune.cost.parameters import kept_share
from prunetune.search.searcher import Decision, detach_to
from prunetune.train.adapters import trainable_parameters
from prunetune.train.checkpoints import TrainingState, optimizer_tensors, restore_optimizer
from prunetune.train.job import StepRecord, TrainingJob
from prunetune.train.recovery import StepGuard
from prunetune.train.schedule import Schedule
from prunetune.train.trainers import AdapterTrainer, GeneratorTrainer
from prunetune.train.validation import Validation


class TrainingProgress:
    """Knows how far the run has come."""

    def __init__(
        self, job: TrainingJob, generator_trainer: GeneratorTrainer, adapter_trainer: AdapterTrainer, guard: StepGuard
    ) -> None:
        self.job, self.generator_trainer, self.adapter_trainer, self.guard = (
            job,
            generator_trainer,
            adapter_trainer,
            guard,
        )
        self.validation = Validation(job, generator_trainer, adapter_trainer)
        self.step = 0
        self.last: Decision | None = None
        self.gates: Mapping[str, Tensor] = {}  # of the last decision, on the CPU
        self.kept = 1.0
        self.started = time.monotonic()

    @property
    def schedule(self) -> Schedule:
        """The job's own, until a gate moves it."""
        return self.validation.history.schedule

    def resume(self) -> Decision:
        """Go back to the newest whole checkpoint, or to the start; returns the decision that stood there."""
        searcher, state = self.generator_trainer.searcher, self.job.checkpoints.latest()
        plan = self.job.given_plan if state is None else state.plan
        if state is not None:
            if state.is_cut and plan is not None:
                self.adapter_trainer.apply_cut(plan)
            self.adapter_trainer.load(state.tensors["adapters"], state.tensors["adapter_optimizer"])
            searcher.load_state_tensors(state.tensors["generator"])
            restore_optimizer(
                self.generator_trainer.optimizer, searcher.parameter_names(), state.tensors["generator_optimizer"]
            )
            self.guard.restore(state.guard_state)
            self.step, self.started = state.step, self.started - state.seconds
            if opened := state.tensors.get("decision"):
                self.gates = {name: gate.float() for name, gate in opened.items()}
        self.validation.resume(state)
        return searcher.decision_from_plan(plan) if plan else searcher.dense_decision()

    def record_step(self, record: StepRecord, decision: Decision) -> None:
        """A step is done: complete its record and tell the observer."""
        job, self.step, before, is_new = self.job, record["step"], self.gates, decision is not self.last
        if is_new:
            self.gates = detach_to(decision.gates, "cpu")  # by one transfer, where a GPU would wait for many small sums
            self.kept = float(kept_share(self.gates, job.sites))
        record["kept"] = self.kept
        record["seconds"] = self._seconds()
        if before and is_new:
            record["changed"] = self._changed(before)
        self.last = decision
        if self._should_log_widths(record):
            record["widths"] = {name: int(gate.sum()) for name, gate in self.gates.items()}
        job.observer.step(record)

    def validate(self, record: StepRecord, decision: Decision) -> Decision:
        """Score the sub-network decided now, where it is time to; a gate may change what holds from here on."""
        return self.validation.validate_if_due(record, decision, self._state)

    def save_if_due(self, decision: Decision) -> None:
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

    def _should_log_widths(self, record: StepRecord) -> bool:
        """While decisions move, every few steps: what a picture of them over time needs."""
        return record["phase"] == "search" and (self.step == 1 or self.step % self.job.config.train.log_every == 0)

    def _state(self, decision: Decision) -> TrainingState:
        named, searcher = trainable_parameters(self.job.model), self.generator_trainer.searcher
        tensors = {
            "adapters": {name: parameter.detach() for name, parameter in named.items()},
            "adapter_optimizer": optimizer_tensors(self.adapter_trainer.optimizer, list(named)),
            "generator": searcher.state_tensors(),
            "generator_optimizer": optimizer_tensors(self.generator_trainer.optimizer, searcher.parameter_names()),
        }
        if self.gates and decision.plan is None:
            tensors["decision"] = {name: gate.bool() for name, gate in self.gates.items()}
        seen, faults = self.validation.history.to_dict(), self.guard.to_dict()
        return TrainingState(
            self.step, decision.plan, self.adapter_trainer.is_cut, tensors, seen, faults, self._seconds()
        )
