"""The trainer of the pruning-decision generator (ATP, authors' code); `recipes/paper.yaml` uses it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from prunetune.search.searcher import Searcher
from prunetune.train.checkpoints import optimizer_tensors, restore_optimizer
from prunetune.train.job import TrainingJob
from prunetune.train.passes import Passes
from prunetune.train.step_guard import StepGuard
from prunetune.train.weight_trainer import adamw
from prunetune.utils.json_lines import JsonObject

# Authors' code:
CLIP = 3.0  # largest norm of the generator's gradient


class GeneratorTrainer:
    """Trains the pruning-decision generator; the model's weights are frozen in its passes."""

    def __init__(self, job: TrainingJob, passes: Passes, guard: StepGuard) -> None:
        self.job, self.passes, self.guard = job, passes, guard
        self.searcher = Searcher(job.sites, job.constraints, job.config, next(job.model.parameters()).device)
        self.names = [name for name, _ in self.searcher.generator.named_parameters()]
        self.optimizer = adamw(self.searcher.generator.parameters(), lr=job.config.search.learning_rate)

    def train_step(self, step: int) -> JsonObject:
        """One generator step on a calibration batch. Returns its losses."""
        job, searcher = self.job, self.searcher
        gates, batch = searcher.sample(step), job.search_stream.batch_at(step)
        work = partial(self.passes.gate_gradients, batch, gates)
        losses, gradients = self.guard.retry_smaller(batch, work, lambda: None)
        ratio_loss = searcher.backward(gates, gradients)
        norm = torch.nn.utils.clip_grad_norm_(searcher.generator.parameters(), CLIP)
        if not self.guard.should_skip(step, {"generator's gradient": float(norm)}, batch):
            rate = generator_learning_rate(step, job.schedule.search, job.config.search.learning_rate)
            self.optimizer.param_groups[0]["lr"] = rate * self.guard.lr_scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {f"search_{name}": loss for name, loss in losses.items()} | {"ratio_loss": ratio_loss}

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Generator and its optimiser, for a checkpoint."""
        optimizer = optimizer_tensors(self.optimizer, self.names)
        return {"generator": self.searcher.generator.state_dict(), "generator_optimizer": optimizer}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `state_tensors` returned."""
        self.searcher.generator.load_state_dict(tensors["generator"])
        restore_optimizer(self.optimizer, self.names, tensors["generator_optimizer"])


def generator_learning_rate(step: int, steps: int, peak: float) -> float:
    """`peak`, and a fifth of it in the last fifth of the search's `steps` (ATP, authors' code).

    Their cosine to 1e-4 moves once an epoch, at its end, and the generator learns for one epoch: it never acts.
    """
    return peak * (1 if step < int(0.8 * steps) else 0.2)
