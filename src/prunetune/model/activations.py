"""Statistics of a frozen model on calibration batches without padding: moments of inputs, cosines across layers.

Shapes: B examples, T tokens, N tokens without padding, C columns of a linear.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunetune.data.batches import Batch
from prunetune.model.lm_head import select_head_inputs


@dataclass
class Moments:
    """Running mean and squared deviations of each column, merged batch by batch (Chan, Golub and LeVeque 1979)."""

    count: int = 0
    mean: Tensor | float = 0.0  # float64 [C]
    squares: Tensor | float = 0.0  # sum of squared deviations from the mean, float64 [C]

    def add(self, rows: Tensor) -> None:
        """Include the rows of one batch: [N, C]."""
        values = rows.double()
        batch_mean, count_before = values.mean(0), self.count
        self.count += len(values)
        shift = batch_mean - self.mean
        self.mean = self.mean + shift * (len(values) / self.count)
        batch_squares = (values - batch_mean).square().sum(0)
        self.squares = self.squares + batch_squares + shift.square() * (count_before * len(values) / self.count)

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
    """Moments of each module's first input over all tokens without padding: {module: of [C]}."""
    moments = {name: Moments() for name in modules}
    _read_inputs(model, moments, batches, lambda name, rows: moments[name].add(rows))
    return moments


def input_grams(model: Any, modules: Iterable[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Sum of x x^T over the first inputs x of each module, all tokens without padding: {module: float32 [C, C]}."""
    grams: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        gram = rows.float().t() @ rows.float()
        grams[name] = grams[name] + gram if name in grams else gram

    _read_inputs(model, modules, batches, add)
    return grams


def input_mean_squares(model: Any, modules: Iterable[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Mean of x^2 over all tokens without padding, of each module's first inputs x: {module: float64 [C] on the CPU}.

    Modules that are not called are left out.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        total = rows.float().square().sum(0).cpu().double()
        sums[name] = sums[name] + total if name in sums else total

    _read_inputs(model, modules, batches, add)
    tokens = sum(sum(batch.lengths) for batch in batches)
    return {name: total / tokens for name, total in sums.items()}


def _read_inputs(
    model: Any, modules: Iterable[str], batches: Sequence[Batch], read: Callable[[str, Tensor], None]
) -> None:
    """Call `read(module, rows [N, C])` with the tokens without padding of every first input of these modules."""
    masks: list[Tensor] = []

    def hook(name: str) -> Any:
        # [B, T, C], or [B * T, C] where a family flattens
        return lambda _, inputs: read(name, inputs[0].flatten(0, -2)[masks[-1].flatten()])

    names = dict.fromkeys(modules)
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    _forward_batches(model, batches, masks, handles)


def block_influences(model: Any, layers: Iterable[str], batches: Sequence[Batch]) -> dict[str, float]:
    """1 - mean cosine between input and output of each decoder layer, over all tokens without padding."""
    sums = dict.fromkeys(layers, 0.0)
    masks: list[Tensor] = []

    def hook(name: str) -> Any:
        def add_cosines(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            before = inputs[0] if inputs else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = F.cosine_similarity(before[masks[-1]].float(), after[masks[-1]].float(), dim=-1)
            sums[name] += float(cosines.double().sum())

        return add_cosines

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in sums]
    _forward_batches(model, batches, masks, handles)
    tokens = sum(sum(batch.lengths) for batch in batches)
    return {name: 1 - total / tokens for name, total in sums.items()}


@torch.no_grad()
def _forward_batches(model: Any, batches: Sequence[Batch], masks: list[Tensor], handles: Sequence[Any]) -> None:
    """Run every batch through the model, then remove these hooks; the head sees one token only.

    While a batch runs, `masks` ends with its tokens without padding: bool [B, T].
    """
    try:
        device = next(model.parameters()).device
        for batch in batches:
            placed = batch.to(device)
            masks.append(placed.token_mask)
            with select_head_inputs(model, torch.zeros(1, dtype=torch.long, device=device)):
                model(input_ids=placed.input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
