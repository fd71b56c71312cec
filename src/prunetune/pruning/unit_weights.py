"""The parameters that the units of a site own, each with the sums of its entries by unit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.pruning.linears import ROWS, as_out_in, get_base_linear
from prunetune.pruning.units import LinearSlice, ParamSlice, Site


@dataclass(frozen=True)
class UnitWeight:
    """One parameter that the units of a site own, in part or whole."""

    parameter: nn.Parameter
    # Values of the parameter's shape -> their sum over the entries of each unit, float64 [U] on the CPU.
    sum_per_unit: Callable[[Tensor], Tensor]


def unit_weights(model: Any, site: Site) -> list[UnitWeight]:
    """Each producer's weight and bias, then the consumer's weight, then parameters that belong to no linear."""
    if site.kind.is_whole_block:
        linears = site.weights.block_linears
        modules = linears if site.gated_module in linears else (site.gated_module,)
        return [
            UnitWeight(parameter, lambda values: values.sum(dtype=torch.float64).cpu()[None])
            for name in modules
            for parameter in model.get_submodule(name).parameters()
        ]

    def of_linear(values: Tensor, linear_slice: LinearSlice, linear: Any, axis: int) -> Tensor:
        rows = as_out_in(linear, values) if axis == ROWS else as_out_in(linear, values).t()
        sums = rows.sum(1, dtype=torch.float64) if rows.dim() > 1 else rows.double()
        return linear_slice.sum_per_unit(sums.cpu(), site.units)

    def of_param(values: Tensor, param: ParamSlice) -> Tensor:
        groups, rows = values.double().cpu(), LinearSlice(param.parameter, param.part_sizes)
        groups, axis = (groups[None], param.axis + 1) if param.parent_groups == 1 else (groups, param.axis)
        units = site.units // param.parent_groups
        return torch.cat([rows.sum_per_unit(group, units) for group in groups.moveaxis(axis, 1)])

    weights = []
    for linear_slice, axis in site.linear_slices():
        linear = get_base_linear(model, linear_slice.module)
        sum_per_unit = partial(of_linear, linear_slice=linear_slice, linear=linear, axis=axis)
        biases = [linear.bias] if axis == ROWS and linear.bias is not None else []
        weights += [UnitWeight(parameter, sum_per_unit) for parameter in (linear.weight, *biases)]
    for param in site.weights.params:
        weights.append(UnitWeight(model.get_parameter(param.parameter), partial(of_param, param=param)))
    return weights
