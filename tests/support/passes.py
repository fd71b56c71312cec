"""Helpers of tests of passes: gradients of the adapters, and their comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunetune.train.adapters import trainable_parameters


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients that the adapters have accumulated; zeroed in place, as trainers do: recordings know the tensors."""
    accumulated = {
        name: parameter.grad for name, parameter in trainable_parameters(model).items() if parameter.grad is not None
    }
    taken = {name: grad.clone() for name, grad in accumulated.items()}
    for grad in accumulated.values():
        grad.zero_()
    return taken


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )
