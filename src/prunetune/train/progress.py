"""Progress of a training run: records of steps, validations and checkpoints, and how a run resumes."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from prunetune.pruning.units import effective_gates
from prunetune.search.plan_rules import budget_share
from prunetune.search.select import Decision, detach_to
from prunetune.train.adapters import trainable_parameters
from prunetune.train.checkpoints import TrainingState, optimizer_tensors
from prunetune.train.decisions import GeneratorTrainer
from prunetune.train.job import TrainingJob
from prunetune.train.schedule import Schedule
from prunetune.train.step_guard import StepGuard
from prunetune.train.validation import Validation
from prunetune.train.weight_trainer import WeightTrainer
from prunetune.utils.json_lines import JsonObject


class TrainingProgress:
    """The step that a run has reached, and everything that is recorded or saved there."""

    def __init__(
        self,
        job: TrainingJob,
        weight_trainer: WeightTrainer,
        generator_trainer: GeneratorTrainer | None,
        guard: StepGuard,
    ) -> None:
        self.job, self.guard = job, guard
        self.weight_trainer, self.generator_trainer = weight_trainer, generator_trainer
        searcher = generator_trainer.searcher if generator_trainer else None
        self.validation = Validation(job, weight_trainer, searcher, self._state)
        self.step = 0
        self.recorded: Decision | None = None  # the newest decision in the records
        self.gates: Mapping[str, Tensor] = {}  # of that decision, on the CPU
        self.kept = 1.0
        self.started = time.monotonic()  # of the run, less the time between its processes

    @property
    def schedule(self) -> Schedule:
        """The job's own, until a limit changes it."""
        return self.validation.schedule

    def resume(self) -> Decision:
        """Load the newest whole checkpoint, or else the state to start from; returns the decision that held there."""
        job, state = self.job, self.job.checkpoints.latest()
        loaded = state or job.start_state
        self.validation.resume(state)
        if loaded is not None:
            if loaded.is_cut and loaded.plan is not None:
                self.weight_trainer.apply_cut(loaded.plan, self.schedule.stage_steps(state.step - 1 if state else 0))
            self.weight_trainer.load(loaded.tensors["adapters"], loaded.tensors["adapter_optimizer"])
        if state is not None:
            if self.generator_trainer is not None:
                self.generator_trainer.load(state.tensors)
            self.guard.restore(state.guard_state)
            self.step, self.started = state.step, self.started - state.seconds
        plan = job.given_plan if loaded is None else loaded.plan
        dense_gates = {site.name: torch.ones(site.units) for site in job.sites}
        decision = Decision.from_plan(plan, job.sites) if plan else Decision(dense_gates)
        if state is not None and plan:
            self.recorded, self.gates = decision, decision.gates
            self.kept = self._share_of_budget()
        return decision

    def record_step(self, record: JsonObject, decision: Decision) -> None:
        """Complete the record of a step and give it to the observer."""
        job, self.step, before, is_new = self.job, record["step"], self.gates, decision is not self.recorded
        if is_new:
            self.gates = detach_to(decision.gates, "cpu")  # one transfer, not many small sums on a GPU
            self.kept = self._share_of_budget()
        record["kept"] = self.kept
        record["seconds"] = time.monotonic() - self.started
        if before and is_new:  # share of all units whose gate changed
            changed = torch.cat([self.gates[site.name] != before[site.name] for site in job.sites])
            record["changed"] = float(changed.float().mean())
        self.recorded = decision
        is_logged = self.step == 1 or self.step % job.config.train.log_every == 0
        # For the picture of decisions over time: what every cut leaves, and what a search proposes.
        if self.schedule.cut_at(self.step - 1) or (record["phase"] == "search" and is_logged):
            record["widths"] = {name: int(gate.sum()) for name, gate in self.gates.items()}
        job.observer.step(record)

    def _share_of_budget(self) -> float:
        """The share that the newest decision keeps, as `budget.keep` counts it."""
        gates = effective_gates(self.gates, self.job.sites)
        counts = {name: int(gate.sum()) for name, gate in gates.items()}
        return budget_share(self.job.sites, counts, self.job.constraints)

    def save_if_due(self, decision: Decision) -> None:
        """Save a checkpoint every `train.checkpoint_every` steps, and where a phase ends."""
        if self.step % self.job.config.train.checkpoint_every == 0 or self.schedule.ends_phase(self.step - 1):
            self.save(decision)
        if self.job.branch_checkpoints is not None and self.step == self.schedule.branch_step:
            self.job.branch_checkpoints.save(self._state(decision))

    def restore_best(self, decision: Decision) -> None:
        """End with the weights of the best validation after the last cut, if `train.keep_best` says so."""
        if best := self.validation.best_state(decision):
            self.weight_trainer.load(best.tensors["adapters"], best.tensors["adapter_optimizer"])
            self.save(decision)

    def save(self, decision: Decision) -> None:
        """Save a checkpoint of this step."""
        self.job.checkpoints.save(self._state(decision))

    def _state(self, decision: Decision) -> TrainingState:
        named = trainable_parameters(self.job.model)
        tensors = {
            "adapters": {name: parameter.detach() for name, parameter in named.items()},
            "adapter_optimizer": optimizer_tensors(self.weight_trainer.optimizer, list(named)),
        }
        if self.generator_trainer is not None:
            tensors |= self.generator_trainer.state_tensors()
        history, guard_state = self.validation.history.to_dict(), self.guard.to_dict()
        is_cut, seconds = self.weight_trainer.is_cut, time.monotonic() - self.started
        return TrainingState(self.step, decision.plan, is_cut, tensors, history, guard_state, seconds)
