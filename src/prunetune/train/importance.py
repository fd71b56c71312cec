"""Scores of units on the weights as they are: what decides every cut of progressive removal."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.remaining_sites import in_dense_numbering
from prunetune.pruning.units import Site
from prunetune.search.select import Scores
from prunetune.train.job import TrainingJob
from prunetune.train.passes import Passes
from prunetune.train.step_guard import StepGuard


def score_units(
    job: TrainingJob, passes: Passes, guard: StepGuard, sites: Sequence[Site], plan: Plan | None, step: int
) -> Scores:
    """Score of every unit of the dense model, {site: [U]} on the CPU; zero for those that the plan has removed.

    A unit's importance divided by what it and all inside it take of the budget: parameters, or prices under limits.
    `sites` are those of the model as it is, which the plan has cut.
    """
    importance = gate_importance(job, passes, guard, sites, step)
    limits, dense = job.constraints.limits, {site.name: site for site in job.sites}
    scores = {}
    for site in sites:
        price = float(site.total_unit_params)
        if limits and limits.prices_with_children:
            price *= limits.prices_with_children[site.name] / dense[site.name].total_unit_params
        scores[site.name] = importance[site.name] / price
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
