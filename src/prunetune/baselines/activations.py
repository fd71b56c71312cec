"""What a frozen model's layers see on calibration batches: moments of inputs, change of direction. Real tokens only.

Shapes: B examples, T tokens, N real tokens, C columns of a consumer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunetune.data.batches import Batch
from prunetune.model.lm_head import select_head_inputs


@dataclass
class Moments:
    """Running mean and squared deviations of columns, merged batch by batch (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: Tensor | float = 0.0  # float64 [C]
    squares: Tensor | float = 0.0  # sum of squared deviations from the mean, float64 [C]

    def add(self, rows: Tensor) -> None:
        """Take in rows [N, C]."""
        values = rows.double()
        here, seen = values.mean(0), self.count
        self.count += len(values)
        shift = here - self.mean
        self.mean = self.mean + shift * (len(values) / self.count)
        self.squares = (
            self.squares + (values - here).square().sum(0) + shift.square() * (seen * len(values) / self.count)
        )

    @property
    def average(self) -> Tensor:
        """Mean of each column: float64 [C] on the CPU."""
        return torch.as_tensor(self.mean).cpu()

    @property
    def variance(self) -> Tensor:
        """Sample variance of each column, 0 for one row: float64 [C] on the CPU."""
        return torch.as_tensor(self.squares).cpu() / max(self.count - 1, 1)

    @property
    def norm(self) -> Tensor:
        """L2 norm of each column: float64 [C] on the CPU."""
        return (torch.as_tensor(self.squares).cpu() + self.count * self.average.square()).sqrt()


def input_moments(model: Any, modules: Iterable[str], batches: Sequence[Batch]) -> dict[str, Moments]:
    """Moments of each module's first input over the real tokens: {module: of [C]}."""
    found = {name: Moments() for name in modules}
    real: list[Tensor] = []

    def listen(moments: Moments) -> Any:
        # [B, T, C], or [B * T, C] where a family flattens
        return lambda _, inputs: moments.add(inputs[0].flatten(0, -2)[real[-1].flatten()])

    handles = [model.get_submodule(name).register_forward_pre_hook(listen(found[name])) for name in found]
    with _removed(handles):
        _forward_batches(model, batches, real)
    return found


def block_influences(model: Any, layers: Iterable[str], batches: Sequence[Batch]) -> dict[str, float]:
    """1 - mean cosine between input and output of each decoder layer, over the real tokens."""
    sums = dict.fromkeys(layers, 0.0)
    real: list[Tensor] = []

    def listen(name: str) -> Any:
        def hear(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            before = inputs[0] if inputs else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = F.cosine_similarity(before[real[-1]].float(), after[real[-1]].float(), dim=-1)
            sums[name] += float(cosines.double().sum())

        return hear

    handles = [model.get_submodule(name).register_forward_hook(listen(name), with_kwargs=True) for name in sums]
    with _removed(handles):
        _forward_batches(model, batches, real)
    tokens = sum(sum(batch.lengths) for batch in batches)
    return {name: 1 - total / tokens for name, total in sums.items()}


@torch.no_grad()
def _forward_batches(model: Any, batches: Sequence[Batch], real: list[Tensor]) -> None:
    """Forward every batch; `real` ends with the mask of the batch under way. The head reads one token only."""
    device = next(model.parameters()).device
    for batch in batches:
        placed = batch.to(device)
        real.append(placed.token_mask)
        with select_head_inputs(model, torch.zeros(1, dtype=torch.long, device=device)):
            model(input_ids=placed.input_ids, use_cache=False)


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
