"""The trainer of the pruning-decision generator (ATP, authors' code); `recipes/paper.yaml` uses it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from prunetune.search.decision import Decision
from prunetune.search.searcher import Searcher
from prunetune.train.checkpoints import optimizer_tensors, restore_optimizer
from prunetune.train.job import TrainingJob
from prunetune.train.passes import Passes
from prunetune.train.step_guard import StepGuard
from prunetune.train.weight_trainer import adamw
from prunetune.utils.json_lines import JsonObject

# Authors' code:
CLIP = 3.0  # largest norm of the generator's gradient
SMALL_BUDGET_LOSS, ENOUGH_STEPS = 0.005, 4000  # so many steps in a row with so small a budget loss end its training


class GeneratorTrainer:
    """Trains the pruning-decision generator; the model's weights are frozen in its passes."""

    def __init__(self, job: TrainingJob, passes: Passes, guard: StepGuard) -> None:
        self.job, self.passes, self.guard = job, passes, guard
        self.searcher = Searcher(job.sites, job.constraints, job.config, next(job.model.parameters()).device)
        self.optimizer = adamw(self.searcher.generator.parameters(), lr=job.config.search.learning_rate)

    @property
    def has_stopped(self) -> bool:
        """Whether the generator has met the budget for long enough, and learns no more."""
        return self.searcher.steps_on_budget >= ENOUGH_STEPS

    def train_step(self, step: int) -> JsonObject:
        """One generator step on a calibration batch; nothing once training has stopped. Returns its losses."""
        if self.has_stopped:
            return {}
        job, searcher = self.job, self.searcher
        gates, batch = searcher.sample(step), job.search_stream.batch_at(step)
        work = partial(self.passes.gate_gradients, batch, gates)
        losses, gradients = self.guard.retry_smaller(batch, work, lambda: None)
        ratio_loss = searcher.budget_loss(gates)
        # The gradient of gates @ gradients at the gates is the model's: so it flows on into the generator.
        total = torch.cat(list(gates.values())) @ torch.cat([gradients[name] for name in gates])
        job.accelerator.backward(total + job.config.search.ratio_weight * ratio_loss)
        norm = job.accelerator.clip_grad_norm_(searcher.generator.parameters(), CLIP)
        if not self.guard.should_skip(step, {"generator's gradient": float(norm)}, batch):
            rate = generator_learning_rate(step, job.schedule.search, job.config.search.learning_rate)
            self.optimizer.param_groups[0]["lr"] = rate * self.guard.lr_scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        record = {f"search_{name}": loss for name, loss in losses.items()} | {"ratio_loss": float(ratio_loss.detach())}
        is_small = record["ratio_loss"] <= SMALL_BUDGET_LOSS
        searcher.steps_on_budget = searcher.steps_on_budget + 1 if is_small else 0
        return record

    def decide(self, step: int) -> Decision:
        """The hard decision under which the adapters take their step: a draw, or the final one once training stopped.

        It has no plan yet: the search goes on.
        """
        return Decision(self.searcher.final_decision().gates) if self.has_stopped else self.searcher.decide(step)

    def final_decision(self) -> Decision:
        """The decision of the search as a whole: no noise, exact budget."""
        return self.searcher.final_decision()

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Generator and its optimiser, for a checkpoint."""
        optimizer = optimizer_tensors(self.optimizer, self.searcher.parameter_names())
        return {"generator": self.searcher.state_tensors(), "generator_optimizer": optimizer}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_tensors` returned."""
        self.searcher.load_state_tensors(tensors["generator"])
        restore_optimizer(self.optimizer, self.searcher.parameter_names(), tensors["generator_optimizer"])


def generator_learning_rate(step: int, steps: int, peak: float) -> float:
    """`peak`, and a fifth of it in the last fifth of the search's `steps` (ATP, authors' code).

    Their cosine to 1e-4 moves once an epoch, at its end, and the generator learns for one epoch: it never acts.
    """
    return peak * (1 if step < int(0.8 * steps) else 0.2)
