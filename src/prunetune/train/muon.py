"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al. 2024).

The update has the root mean square of an AdamW step (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that learning
rates mean the same. As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and no weight decay, but matrices of
one shape go together, and on a GPU an update is one recorded graph: there are hundreds of small matrices, and products
of so few numbers are launches, not work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.train.cuda_graphs import CudaGraphRecorder

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
MOMENTUM = 0.95
ADAMW_UPDATE_RMS = 0.2  # root mean square of AdamW's updates
WARMUP = 20  # updates: momentum starts from nothing


class Muon(torch.optim.Optimizer):
    """Of matrices only, each of which has a gradient at every update."""

    def __init__(self, weights: Iterable[nn.Parameter], *, lr: float) -> None:
        super().__init__(list(weights), {"lr": lr})
        self._weights: list[nn.Parameter] = self.param_groups[0]["params"]
        self._recorder = CudaGraphRecorder(self._weights[0].device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight."""
        states = [self._state_of(weight) for weight in self._weights]
        torch._foreach_add_([state["step"] for state in states], 1)
        rate = torch.tensor(self.param_groups[0]["lr"] * min(1.0, float(states[0]["step"]) / WARMUP))
        self._recorder.run("update", self._update, [rate])

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(weight)}
        return state

    @torch.no_grad()
    def _update(self, inputs: Sequence[Tensor]) -> None:
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in self._weights:
            shapes.setdefault(tuple(weight.shape), []).append(weight)
        for (rows, columns), alike in shapes.items():
            gradients = [weight.grad for weight in alike if weight.grad is not None]
            buffers = [self.state[weight]["momentum"] for weight in alike]
            torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM))  # Nesterov
            updates = orthogonalize(ahead).float() * (-ADAMW_UPDATE_RMS * max(rows, columns) ** 0.5 * inputs[0])
            torch._foreach_add_(alike, list(updates.unbind()))


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[n, rows, columns] -> the same singular vectors with singular values near one.

    In bfloat16, which is enough, but in float32 on a CPU: most have no fast bfloat16.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        even = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, even, x, beta=a)
    return x.mT if tall else x
