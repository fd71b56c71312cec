"""The trainer of the pruning-decision generator (ATP, authors' code); `recipes/paper.yaml` uses it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from prunetune.search.searcher import Decision, Searcher
from prunetune.train.job import TrainingJob
from prunetune.train.passes import GateTensors, Passes
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
        decay = 0.0 if job.config.search.generator == "none" else 0.01  # free logits would decay to zero
        rate, weights = job.config.search.learning_rate, self.searcher.generator.parameters()
        self.optimizer = adamw(weights, lr=rate, weight_decay=decay)

    @property
    def has_stopped(self) -> bool:
        """Whether the generator has met the budget for long enough, and learns no more."""
        return self.searcher.steps_on_budget >= ENOUGH_STEPS

    def train_step(self, step: int) -> JsonObject:
        """One generator step on a calibration batch; nothing once training has stopped. Returns its losses."""
        if self.has_stopped:
            return {}
        gates, batch = self.searcher.sample(step), self.job.search_stream.batch_at(step)
        work = partial(self.passes.gate_gradients, batch, gates)
        losses, gradients = self.guard.retry_smaller(batch, work, lambda: None)
        budget_loss = self._backward(gates, gradients)
        norm = self.job.accelerator.clip_grad_norm_(self.searcher.generator.parameters(), CLIP)
        if not self.guard.should_skip(step, {"generator's gradient": float(norm)}, batch):
            rate = generator_learning_rate(step, self.job.schedule.search, self.job.config.search.learning_rate)
            self.optimizer.param_groups[0]["lr"] = rate * self.guard.lr_scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.searcher.steps_on_budget = self.searcher.steps_on_budget + 1 if budget_loss <= SMALL_BUDGET_LOSS else 0
        return {f"search_{name}": loss for name, loss in losses.items()} | {"ratio_loss": budget_loss}

    def _backward(self, gates: dict[str, Tensor], gradients: GateTensors) -> float:
        """Gradients of the generator, averaged over ranks, from those of the loss at its gates; the budget loss."""
        budget_loss = self.searcher.budget_loss(gates)
        # The gradient of gates @ gradients at the gates is the model's: so it flows on into the generator.
        total = torch.cat(list(gates.values())) @ torch.cat([gradients[name] for name in gates])
        self.job.accelerator.backward(total + self.job.config.search.ratio_weight * budget_loss)
        if self.job.ranks.world_size > 1:  # equal but for kernels that add in no fixed order (a GRU's, on a GPU)
            averaged = [weight.grad for weight in self.searcher.generator.parameters() if weight.grad is not None]
            self.job.ranks.all_reduce_sum_(averaged)
            torch._foreach_div_(averaged, self.job.ranks.world_size)
        return float(budget_loss.detach())

    def decide(self, step: int) -> Decision:
        """The hard decision under which the adapters take their step: a draw, or the final one once training stopped.

        It has no plan yet: the search goes on.
        """
        return Decision(self.searcher.final_decision().gates) if self.has_stopped else self.searcher.decide(step)

    def final_decision(self) -> Decision:
        """The decision of the search as a whole: no noise, exact budget."""
        return self.searcher.final_decision()


def generator_learning_rate(step: int, steps: int, peak: float) -> float:
    """`peak`, and a fifth of it in the last fifth of the search's `steps` (ATP, authors' code).

    Their cosine to 1e-4 moves once an epoch, at its end, and the generator learns for one epoch: it never acts.
    """
    return peak * (1 if step < int(0.8 * steps) else 0.2)
