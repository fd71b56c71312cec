"""Sizes and weights of linear layers as [out, in]: rows are outputs, columns are inputs.

GPT-2's `Conv1D` stores its weight as [in, out], and calls its sizes `nx` (in) and `nf` (out).
"""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunetune.errors import UnknownArchitecture

ROWS, COLUMNS = 0, 1  # axes of a weight, seen as [out, in]


def unwrap_adapter(module: nn.Module) -> Any:
    """The linear inside an adapter; any other module as it is."""
    return getattr(module, "base_layer", module)


def get_base_linear(model: nn.Module, name: str) -> Any:
    """The linear of that name without its adapter; raises `UnknownArchitecture` for a module that cannot be cut."""
    module = unwrap_adapter(model.get_submodule(name))
    if not isinstance(module, nn.Linear | Conv1D):
        raise UnknownArchitecture(
            f"{name} is a {type(module).__name__}, and only nn.Linear and Conv1D can be cut: "
            "load the model unquantised, or prune a family listed in docs/extend/family.md"
        )
    return module


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is stored [in, out]."""
    return isinstance(linear, Conv1D)


def axis_size(linear: Any, axis: int) -> int:
    """Outputs (axis 0) or inputs (axis 1)."""
    if is_transposed(linear):
        return int((linear.nf, linear.nx)[axis])
    return int((linear.out_features, linear.in_features)[axis])


def set_axis_size(linear: Any, axis: int, count: int) -> None:
    """Set the number of outputs (axis 0) or inputs (axis 1) that the linear states."""
    names = ("nf", "nx") if is_transposed(linear) else ("out_features", "in_features")
    setattr(linear, names[axis], count)


def stored_axis(linear: nn.Module, axis: int) -> int:
    """The axis of the stored weight that holds outputs (axis 0) or inputs (axis 1)."""
    return 1 - axis if is_transposed(linear) else axis


def as_out_in(linear: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the stored weight's shape as [out, in]; a bias as it is."""
    return weight.t() if is_transposed(linear) and weight.dim() > 1 else weight


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in a submodule's place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
