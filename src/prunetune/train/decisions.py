"""What decides a cut: scores of units on the weights as they are, or the generator of ATP while it is trained."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.remaining_sites import in_dense_numbering
from prunetune.pruning.units import Site
from prunetune.search.searcher import Searcher
from prunetune.search.select import Scores
from prunetune.train.checkpoints import optimizer_tensors, restore_optimizer
from prunetune.train.job import TrainingJob
from prunetune.train.passes import Passes
from prunetune.train.step_guard import StepGuard
from prunetune.train.weight_trainer import adamw
from prunetune.utils.json_lines import JsonObject

CLIP = 3.0  # largest norm of the generator's gradient, as in the authors' code


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


def score_units(
    job: TrainingJob, passes: Passes, guard: StepGuard, sites: Sequence[Site], plan: Plan | None, step: int
) -> Scores:
    """Score of every unit of the dense model, {site: [U]} on the CPU; zero for those that the plan has removed.

    A unit's importance divided by what it and all inside it take of the budget: parameters, or prices under limits.
    That of attention counts `search.attention_weight` times: measured, not derived (docs/research/progressive.md).
    `sites` are those of the model as it is, which the plan has cut.
    """
    importance = gate_importance(job, passes, guard, sites, step)
    dense, scores = {site.name: site for site in job.sites}, {}
    for site in sites:
        price = job.constraints.unit_price(site)
        if job.constraints.limits:  # whose prices are of dense units
            price *= site.total_unit_params / dense[site.name].total_unit_params
        weight = job.config.search.attention_weight if site.kind.is_attention else 1.0
        scores[site.name] = weight * importance[site.name] / price
    return in_dense_numbering(scores, job.sites, plan)


def gate_importance(
    job: TrainingJob, passes: Passes, guard: StepGuard, sites: Sequence[Site], step: int
) -> dict[str, Tensor]:
    """Mean squared gradient of the training loss at a gate of one on each unit: {site: [U]}, over search batches.

    First-order importance (Molchanov et al. 2019, arXiv 1906.10771, section 3), of the loss that tuning minimises. A
    batch whose gradients are not finite is skipped, and counted by the guard. Raises `ModelError` if all are.
    """
    device = next(job.model.parameters()).device
    gates = {site.name: torch.ones(site.units, device=device) for site in sites}
    sums, used = {name: torch.zeros_like(gate) for name, gate in gates.items()}, 0
    for index in range(job.config.search.init_batches):
        batch = job.search_stream.batch_at(index)
        losses, gradients = guard.retry_smaller(batch, partial(passes.gate_gradients, batch, gates), lambda: None)
        largest = float(torch.cat(list(gradients.values())).abs().amax())
        if not guard.should_skip(step, {**losses, "gradient at the gates": largest}, batch):
            used += 1
            for name, gradient in gradients.items():
                sums[name] += gradient.square()
    if not used:
        raise ModelError(
            f"none of the {job.config.search.init_batches} batches of search has finite gradients at step {step + 1}, "
            "so no unit can be scored: look at these rows, lower the learning rate, or set dtype float32"
        )
    return {name: total / used for name, total in sums.items()}
