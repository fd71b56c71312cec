"""Gumbel-sigmoid sampling of gates, and rounding with a straight-through gradient (ATP, authors' code)."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_sigmoid(logits: Tensor, *, temperature: float, offset: float, rng: torch.Generator) -> Tensor:
    """Soft gates in (0, 1), of the shape of the logits: sigmoid((logits + noise + offset) / temperature).

    The noise is one Gumbel draw, so a gate is above 0.5 with probability 1 - exp(-exp(logit + offset)): at logit 0 and
    offset 3 with 1 - 2e-9, and training starts dense.
    """
    exponential = torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=rng)
    noise = -exponential.log().to(logits.device, logits.dtype)  # minus the log of an exponential draw is Gumbel
    return torch.sigmoid((logits + noise + offset) / temperature)


def round_straight_through(soft: Tensor) -> Tensor:
    """1 above 0.5, else 0, with the gradient of `soft`."""
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())
