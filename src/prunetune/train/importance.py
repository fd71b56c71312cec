"""How much the training loss depends on each unit, as the weights are now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from prunetune.data.encoding import Example
from prunetune.pruning.units import Site
from prunetune.train.passes import Passes
from prunetune.train.step_guard import StepGuard


def gate_importance(
    passes: Passes,
    guard: StepGuard,
    sites: Sequence[Site],
    batches: Iterable[Sequence[Example]],
    device: torch.device,
    *,
    step: int = 0,
) -> dict[str, Tensor]:
    """{site: [U]}: the mean over batches of the squared gradient of the training loss at each gate, all gates one.

    To first order the square of what the loss changes by if the unit goes (Molchanov et al. 2019, arXiv 1906.10771).
    Batches whose gradient is not finite are skipped through `guard.should_skip`, which raises `ModelError` if they are
    too many; `step` is named there. Passes that run out of memory are made smaller.
    """
    ones = {site.name: torch.ones(site.units, device=device) for site in sites}
    importance, counted = {name: torch.zeros_like(gate) for name, gate in ones.items()}, 0
    for batch in batches:
        work = partial(passes.gate_gradients, batch, ones)
        _, gradients = guard.retry_smaller(batch, work, lambda: None)
        largest = torch.cat(list(gradients.values())).abs().amax()
        if guard.should_skip(step, {"importance": float(largest)}, batch):
            continue
        counted += 1
        for name, gradient in gradients.items():
            importance[name] += gradient.square()
    return {name: value / max(1, counted) for name, value in importance.items()}
