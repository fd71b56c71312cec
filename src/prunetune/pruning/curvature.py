"""Second-order importance: the curvature of the loss at the linears that read units, and what removing a unit costs.

To second order, a change D of a linear's weight [H, C] changes the loss by tr(G D A D^T) / 2N. Here A [C, C] is the sum
over N tokens of x x^T, x the linear's input, and G [H, H] the sum of g g^T, g the loss's gradient at its output: the
Fisher matrix as a Kronecker product (Martens and Grosse 2015, arXiv 1503.05671; to compare layers by it: van der
Ouderaa et al. 2024, LLM Surgeon, arXiv 2312.17244).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import ConfigError
from prunetune.pruning.compensation import damped, removal_errors
from prunetune.pruning.linears import COLUMNS, ROWS, as_out_in, axis_size, get_base_linear
from prunetune.pruning.units import Site
from prunetune.utils.capture_lock import CAPTURE_LOCK


@dataclass(frozen=True)
class Curvature:
    """Of one linear, over the tokens at which the loss depends on it."""

    inputs: Tensor  # A, float32 [C, C]
    gradients: Tensor  # G, float32 [H, H]
    tokens: Tensor  # N, a float32 scalar

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums, which add up over passes and ranks."""
        return self.inputs, self.gradients, self.tokens

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Include a pass: inputs [.., C] of the linear, and the loss's gradient [.., H] at its output.

        A token without gradient, such as padding, is left out; so is a pass whose gradient is not finite.
        """
        with torch.autocast(gradient.device.type, enabled=False):  # sums of products in 16 bits would not be definite
            outputs = gradient.detach().flatten(0, -2).float()
            outputs = torch.where(outputs.isfinite().all(), outputs, 0.0)
            counts = (outputs != 0).any(1, keepdim=True)
            rows = torch.where(counts, inputs.detach().flatten(0, -2).float(), 0.0)
            self.inputs.addmm_(rows.t(), rows)
            self.gradients.addmm_(outputs.t(), outputs)
            self.tokens.add_(counts.sum())


def consumer_name(site: Site) -> str:
    """Name of the linear that reads the units; raises `ConfigError` for units that no linear of their own reads."""
    if site.consumer is None:
        raise ConfigError(
            f"scores that measure the input of a unit's output linear, such as wanda-sp or obs, cannot score "
            f"{site.kind.recipe_name}, which have none of their own: leave them out, or set budget.units to "
            "kv-groups, query-heads and mlp-channels"
        )
    return site.consumer.module


@contextmanager
def record_curvature(model: nn.Module, sites: Iterable[Site]) -> Iterator[Mapping[str, Curvature]]:
    """While the block lasts, every backward pass adds to the curvature of each site's consumer: {linear: Curvature}.

    The sums stay in the same tensors, so that passes may be recorded. The loss is what runs backward.
    """
    curvatures, handles = {}, []

    def hook(curvature: Curvature) -> Any:
        def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if torch.is_grad_enabled():  # else activations will be computed again
                if not output.requires_grad:  # the first one of a frozen model
                    output.requires_grad_()
                rows = inputs[0]
                output.register_hook(lambda gradient: curvature.add(rows, gradient))  # type: ignore[no-untyped-call]

        return record

    try:
        for name in dict.fromkeys(map(consumer_name, sites)):
            linear = get_base_linear(model, name)
            sizes = [(axis_size(linear, axis),) * 2 for axis in (COLUMNS, ROWS)]
            curvature = Curvature(*(linear.weight.new_zeros(size, dtype=torch.float32) for size in (*sizes, ())))
            curvatures[name] = curvature
            handles.append(model.get_submodule(name).register_forward_hook(hook(curvature)))
        yield curvatures
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def removal_costs(model: nn.Module, site: Site, curvature: Curvature) -> Tensor:
    """What removing each unit adds to the loss once its consumer's other columns took over, twice that: float64 [U].

    `removal_errors` of the consumer, its output first multiplied by a root of G, so that an error is a change of loss.
    """
    name = consumer_name(site)
    linear: Any = get_base_linear(model, name)
    with CAPTURE_LOCK:
        root = torch.linalg.cholesky(damped(curvature.gradients))  # L of G = L L^T
        weight = root.t() @ as_out_in(linear, linear.weight.double())
        return removal_errors(weight, curvature.inputs, site.units) / curvature.tokens.clamp_min(1)
