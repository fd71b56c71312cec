"""The weights of a site, each with the way from its entries to units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.pruning.linears import ROWS, as_out_in, get_base_linear
from prunetune.pruning.units import LinearSlice, ParamSlice, Site


@dataclass(frozen=True)
class UnitWeight:
    """One parameter of which units of a site own lines, or all."""

    parameter: nn.Parameter
    sum_per_unit: Callable[
        [Tensor], Tensor
    ]  # values of its shape -> sums over each unit's entries, float64 [U] on the CPU


def unit_weights(model: Any, site: Site) -> list[UnitWeight]:
    """Each producer's weight and bias, then the consumer's weight, then parameters that are no linear's."""
    if site.is_whole_block:
        modules = site.block_linears if site.gated_module in site.block_linears else (site.gated_module,)
        return [
            UnitWeight(parameter, lambda values: values.sum(dtype=torch.float64).cpu()[None])
            for name in modules
            for parameter in model.get_submodule(name).parameters()
        ]
    found = []
    for cut, axis in site.linear_slices():
        linear = get_base_linear(model, cut.module)
        found.append(UnitWeight(linear.weight, _lines_of(cut, site.units, linear, axis)))
        if axis == ROWS and linear.bias is not None:
            found.append(UnitWeight(linear.bias, _lines_of(cut, site.units, linear, axis)))
    return found + [
        UnitWeight(model.get_parameter(part.parameter), _slices_of(part, site)) for part in site.param_slices
    ]


def _lines_of(cut: LinearSlice, units: int, linear: Any, axis: int) -> Callable[[Tensor], Tensor]:
    def per_unit(values: Tensor) -> Tensor:
        lines = as_out_in(linear, values) if axis == ROWS else as_out_in(linear, values).t()
        sums = lines.sum(1, dtype=torch.float64) if lines.dim() > 1 else lines.double()
        return cut.sum_per_unit(sums.cpu(), units)

    return per_unit


def _slices_of(part: ParamSlice, site: Site) -> Callable[[Tensor], Tensor]:
    cut = LinearSlice(part.parameter, part.part_sizes)

    def per_unit(values: Tensor) -> Tensor:
        lanes = values.double().cpu()
        lanes = lanes[None].moveaxis(part.axis + 1, 1) if part.parent_groups == 1 else lanes.moveaxis(part.axis, 1)
        return torch.cat([cut.sum_per_unit(lane, site.units // part.parent_groups) for lane in lanes])

    return per_unit
