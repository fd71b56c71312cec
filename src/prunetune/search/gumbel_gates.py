"""Straight-through Gumbel-sigmoid sampling of gates (ATP, authors' code)."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_sigmoid(logits: Tensor, *, temperature: float, offset: float, rng: torch.Generator) -> Tensor:
    """Soft gates in (0, 1), of the shape of the logits: sigmoid((logits + noise + offset) / temperature).

    The noise is logistic, the difference of two Gumbel draws. A positive offset makes training start near dense.
    """
    uniform = torch.rand(logits.shape, generator=rng).clamp(1e-6, 1 - 1e-6).to(logits.device)
    return torch.sigmoid((logits + torch.logit(uniform) + offset) / temperature)


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`hard` in the forward pass, the gradient of `soft` in the backward pass."""
    return hard + soft - soft.detach()


def round_straight_through(soft: Tensor) -> Tensor:
    """1 above 0.5, else 0, with the gradient of `soft`."""
    return straight_through(soft, (soft > 0.5).to(soft.dtype))
