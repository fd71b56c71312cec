"""Shared by tests of train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunetune.train.adapters import trainable_parameters


def gradients(model: Any) -> dict[str, Tensor]:
    """What the adapters have accumulated; zeroed where it lies, as the players do: recordings know the place."""
    held = {
        name: parameter.grad for name, parameter in trainable_parameters(model).items() if parameter.grad is not None
    }
    taken = {name: grad.clone() for name, grad in held.items()}
    for grad in held.values():
        grad.zero_()
    return taken


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            other[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )
