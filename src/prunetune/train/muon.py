"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024).

The update has the root mean square of an AdamW step (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that learning
rates mean the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.train.graphs import Recorder

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
MOMENTUM = 0.95
MATCHED = 0.2  # root mean square of AdamW's updates


class Muon(torch.optim.Optimizer):
    """Of matrices only. On a GPU an update is one recorded graph: hundreds of small products are launches, not work."""

    def __init__(self, weights: Iterable[nn.Parameter], *, lr: float) -> None:
        super().__init__(list(weights), {"lr": lr})
        self._weights: list[nn.Parameter] = self.param_groups[0]["params"]
        self._recorder = Recorder(self._weights[0].device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight; all of them have gradients."""
        buffers = [self.state[weight].setdefault("momentum", torch.zeros_like(weight)) for weight in self._weights]
        rate = torch.tensor(self.param_groups[0]["lr"])
        self._recorder.run("step", self._move, [rate], [*self._weights, *buffers])

    @torch.no_grad()
    def _move(self, inputs: Sequence[Tensor]) -> None:
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for weight in self._weights:
            shapes.setdefault(tuple(weight.shape), []).append(weight)
        for (rows, columns), alike in shapes.items():
            gradients = [weight.grad for weight in alike if weight.grad is not None]
            buffers = [self.state[weight]["momentum"] for weight in alike]
            torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM))  # Nesterov
            updates = orthogonal(ahead).float() * (-MATCHED * max(rows, columns) ** 0.5 * inputs[0])
            torch._foreach_add_(alike, list(updates.unbind()))


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[n, rows, columns] -> the same singular vectors with singular values near one, in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
