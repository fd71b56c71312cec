"""The Muon optimiser: momentum, orthogonalised matrix by matrix (Jordan et al. 2024).

The update has the root mean square of an AdamW step (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that learning
rates mean the same. As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and no weight decay, but matrices of
one shape are updated together, and on a GPU an update is one CUDA graph: with hundreds of small matrices, launches take
longer than the products.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.train.cuda_graphs import CudaGraphRecorder

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
MOMENTUM = 0.95
ADAMW_UPDATE_RMS = 0.2  # root mean square of AdamW's updates
WARMUP = 20  # updates, because momentum starts at zero


class Muon(torch.optim.Optimizer):
    """Muon for matrices; a vector counts as one of a single row, and a norm before a removed block has no gradient."""

    def __init__(self, weights: Iterable[nn.Parameter], *, lr: float) -> None:
        super().__init__(list(weights), {"lr": lr})
        self._weights: list[nn.Parameter] = self.param_groups[0]["params"]
        self.recorder = CudaGraphRecorder(self._weights[0].device)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every weight."""
        states = [self.state[weight] for weight in self._weights]
        for weight, state in zip(self._weights, states, strict=True):
            if not state:
                state |= {"step": torch.tensor(0.0), "momentum": torch.zeros_like(weight)}
        torch._foreach_add_([state["step"] for state in states], 1)
        rate = torch.tensor(self.param_groups[0]["lr"] * min(1.0, float(states[0]["step"]) / WARMUP))
        self.recorder.run("update", self._update, [rate])

    @torch.no_grad()
    def _update(self, inputs: Sequence[Tensor]) -> None:
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for weight in (weight for weight in self._weights if weight.grad is not None):
            shapes.setdefault((weight.numel() // weight.shape[-1], weight.shape[-1]), []).append(weight)
        for (rows, columns), weights in shapes.items():
            gradients = [weight.grad.view(rows, columns) for weight in weights if weight.grad is not None]
            buffers = [self.state[weight]["momentum"].view(rows, columns) for weight in weights]
            torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
            nesterov = torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM))
            updates = orthogonalize(nesterov).float() * (-ADAMW_UPDATE_RMS * max(rows, columns) ** 0.5 * inputs[0])
            torch._foreach_add_([weight.view(rows, columns) for weight in weights], list(updates.unbind()))


def orthogonalize(matrices: Tensor) -> Tensor:
    """[n, rows, columns] -> matrices with the same singular vectors and singular values near one.

    In bfloat16, which is precise enough, but in float32 on a CPU: most have no fast bfloat16.
    """
    a, b, c = COEFFICIENTS
    x: Tensor = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
