"""The trainer of the pruning-decision generator (ATP, authors' code); `recipes/paper.yaml` uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunetune.data.encoding import Example
from prunetune.search.decision import Decision
from prunetune.search.searcher import Searcher
from prunetune.train.checkpoints import optimizer_tensors, restore_optimizer
from prunetune.train.job import TrainingJob
from prunetune.train.passes import GateTensors, Losses, Passes
from prunetune.train.step_guard import StepGuard
from prunetune.train.weight_trainer import adamw
from prunetune.utils.json_lines import JsonObject


class GeneratorTrainer:
    """Trains the pruning-decision generator; the model's weights are frozen in its passes."""

    def __init__(self, job: TrainingJob, passes: Passes, guard: StepGuard) -> None:
        self.job, self.passes, self.guard = job, passes, guard
        self.device = next(job.model.parameters()).device
        self.searcher = Searcher(
            job.sites, job.constraints, job.config, lambda step: job.config.budget.keep, self.device
        )
        decay = 0.0 if job.config.search.generator == "none" else 0.01  # free logits would decay to zero
        rate, weights = job.config.search.learning_rate, self.searcher.generator.parameters()
        self.optimizer = adamw(weights, lr=rate, weight_decay=decay)

    def train_step(self, step: int) -> JsonObject:
        """One generator step on a calibration batch (ATP, authors' code)."""
        gates, batch = self.sample_gates(step), self.job.search_stream.batch_at(step)
        losses, gradients = self._gate_gradients(batch, gates)
        return {f"search_{name}": loss for name, loss in losses.items()} | self.update(step, gates, gradients, batch)

    def sample_gates(self, step: int) -> dict[str, Tensor]:
        """The gates that the generator proposes at a step, differentiable; the first step initialises its logits."""
        if step == 0 and self.job.config.search.init_batches:
            self.searcher.init_from_importance(self._importance())
        return self.searcher.sample(step)

    def update(
        self, step: int, gates: GateTensors, gradients: GateTensors, batch: Sequence[Example] = ()
    ) -> JsonObject:
        """Update the generator from the loss's gradient at the gates it proposed, and from the budget loss."""
        job = self.job
        ratio = self.searcher.budget_loss(gates) if self.searcher.is_sampled else None
        # The gradient of gates @ gradients at the gates is the model's: so it flows on into the generator.
        total = torch.cat(list(gates.values())) @ torch.cat([gradients[name] for name in gates])
        if ratio is not None:
            total = total + job.config.search.ratio_weight * ratio
        job.accelerator.backward(total)
        self._average_gradients()
        norm = job.accelerator.clip_grad_norm_(self.searcher.generator.parameters(), job.config.train.clip)
        if not self.guard.should_skip(step, {"generator's gradient": float(norm)}, batch):
            self.optimizer.param_groups[0]["lr"] = job.config.search.learning_rate * self.guard.lr_scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {} if ratio is None else {"ratio_loss": float(ratio.detach())}

    def _average_gradients(self) -> None:
        """Average over ranks: gradients are equal but for kernels that add in no fixed order (a GRU's, on a GPU)."""
        if self.job.ranks.world_size == 1:
            return
        gradients = [weight.grad for weight in self.searcher.generator.parameters() if weight.grad is not None]
        self.job.ranks.all_reduce_sum_(gradients)
        torch._foreach_div_(gradients, self.job.ranks.world_size)

    def decide(self, step: int) -> Decision:
        """The hard decision under which the adapters take their step."""
        return self.searcher.decide(step)

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

    def _gate_gradients(self, batch: Sequence[Example], gates: GateTensors) -> tuple[Losses, GateTensors]:
        return self.guard.retry_smaller(batch, lambda: self.passes.gate_gradients(batch, gates), lambda: None)

    def _importance(self) -> dict[str, Tensor]:
        """Mean squared gradient at each gate of the dense model: first-order, over batches (Molchanov et al. 2019)."""
        dense = {site.name: torch.ones(site.units, device=self.device) for site in self.job.sites}
        importance = {name: torch.zeros_like(gate) for name, gate in dense.items()}
        for index in range(self.job.config.search.init_batches):
            batch = self.job.search_stream.batch_at(index)
            _, gradients = self._gate_gradients(batch, dense)
            largest = torch.cat(list(gradients.values())).abs().amax()
            if not self.guard.should_skip(0, {"initial importance": float(largest)}, batch):
                for name, gradient in gradients.items():
                    importance[name] += gradient.square()
        return importance
