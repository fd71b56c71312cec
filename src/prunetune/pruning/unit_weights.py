"""The weights of a site, each with the way from its entries to units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.pruning.linears import ROWS, as_rows, linear_of
from prunetune.pruning.units import Cut, Site, Slice


@dataclass(frozen=True)
class Owned:
    """One parameter of which units of a site own lines, or all."""

    parameter: nn.Parameter
    per_unit: Callable[[Tensor], Tensor]  # values of its shape -> sums over each unit's entries, float64 [U] on the CPU


def owned_weights(model: Any, site: Site) -> list[Owned]:
    """Each producer's weight and bias, then the consumer's weight, then parameters that are no linear's."""
    if site.is_whole:
        modules = site.inside if site.module in site.inside else (site.module,)
        return [
            Owned(parameter, lambda values: values.sum(dtype=torch.float64).cpu()[None])
            for name in modules
            for parameter in model.get_submodule(name).parameters()
        ]
    found = []
    for cut, axis in site.cuts():
        linear = linear_of(model, cut.module)
        found.append(Owned(linear.weight, _lines_of(cut, site.units, linear, axis)))
        if axis == ROWS and linear.bias is not None:
            found.append(Owned(linear.bias, _lines_of(cut, site.units, linear, axis)))
    return found + [Owned(model.get_parameter(part.parameter), _slices_of(part, site)) for part in site.slices]


def _lines_of(cut: Cut, units: int, linear: Any, axis: int) -> Callable[[Tensor], Tensor]:
    def per_unit(values: Tensor) -> Tensor:
        lines = as_rows(linear, values) if axis == ROWS else as_rows(linear, values).t()
        sums = lines.sum(1, dtype=torch.float64) if lines.dim() > 1 else lines.double()
        return cut.summed(sums.cpu(), units)

    return per_unit


def _slices_of(part: Slice, site: Site) -> Callable[[Tensor], Tensor]:
    cut = Cut(part.parameter, part.parts)

    def per_unit(values: Tensor) -> Tensor:
        lanes = values.double().cpu()
        lanes = lanes[None].moveaxis(part.axis + 1, 1) if part.lanes == 1 else lanes.moveaxis(part.axis, 1)
        return torch.cat([cut.summed(lane, site.units // part.lanes) for lane in lanes])

    return per_unit
