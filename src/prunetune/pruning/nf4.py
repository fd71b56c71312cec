"""Linears whose frozen weights are held in 4 bits: the base of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

nf4 rounds blocks of 64 weights, each by a scale of its own. Here no block crosses a line that a cut takes out: blocks
run along the inputs of what produces units (it loses rows) and along the outputs of what consumes them (it loses
columns). So a unit leaves with whole blocks, what stays keeps every bit, and the cut of a quantised model is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunetune.errors import MissingPackage
from prunetune.pruning.linears import COLUMNS, ROWS, as_out_in, get_base_linear, set_axis_size
from prunetune.pruning.sites import lora_target_modules
from prunetune.pruning.units import Site

NF4_BLOCK_SIZE = 64  # weights of a scale
NF4_SCALE_BYTES = 4  # bytes of a scale, float32


def require_nf4() -> None:
    """Raises `MissingPackage` where bitsandbytes, whose kernels these are, is not installed."""
    if find_spec("bitsandbytes") is None:
        raise MissingPackage("lora.quantize nf4 needs bitsandbytes; run: pip install 'prunetune[quant]'")


class NF4Linear(nn.Linear):
    """A frozen linear in nf4. `weight` is dequantised anew whenever it is read, and cannot be set."""

    packed: Tensor  # uint8 [lines, bytes]: two weights a byte, each line padded with zeros to whole blocks
    scales: Tensor  # float32 [lines, blocks]

    def __init__(self, weight: Tensor, bias: Tensor | None, *, cut_axis: int, dtype: torch.dtype) -> None:
        """`weight` [out, in]; `lines`: the axis that may be cut; `dtype`: of the arithmetic."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.cut_axis, self.dtype = cut_axis, dtype
        packed, scales = _quantised(weight if cut_axis == ROWS else weight.t())
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias: Any = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: Any, *, cut_axis: int, dtype: torch.dtype, device: torch.device) -> NF4Linear:
        """A linear or Conv1D in 4 bits on a device; no more than its own weight, in `dtype`, goes there on the way."""
        weight = as_out_in(linear, linear.weight.detach()).to(device, dtype)
        bias = None if linear.bias is None else linear.bias.to(device, dtype)
        return cls(weight, bias, cut_axis=cut_axis, dtype=dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] in the dtype of the arithmetic."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        padded = torch.Size((len(self.packed), 2 * self.packed.shape[1]))
        state = QuantState(self.scales.flatten(), padded, None, NF4_BLOCK_SIZE, "nf4", self.dtype)
        dense: Tensor = dequantize_4bit(self.packed.view(-1, 1), state).view(padded)
        if self.cut_axis == ROWS:
            return dense[:, : self.in_features]
        return dense[:, : self.out_features].t()

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of the arithmetic."""
        result: Tensor = _Multiply.apply(input.to(self.dtype), self)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def keep_indices(self, index: Tensor, axis: int) -> None:
        """Keep these rows or columns, in place: those that `lines` names and no others."""
        if axis != self.cut_axis:
            raise ValueError(f"blocks of 4-bit weights run along axis {axis}: only axis {self.cut_axis} can be cut")
        self.packed, self.scales = self.packed.index_select(0, index), self.scales.index_select(0, index)
        if axis == ROWS and self.bias is not None:
            self.bias = nn.Parameter(self.bias.index_select(0, index), requires_grad=False)
        set_axis_size(self, axis, len(index))

    def dequantize(self) -> nn.Linear:
        """The same as an ordinary linear."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight.contiguous(), requires_grad=False), self.bias
        return linear

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        """Scales move with the rest, and stay float32 whatever the rest becomes."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.packed.device)
        return self


class _Multiply(torch.autograd.Function):
    """x W^T + b. The dense weight lives in neither direction longer than its product."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, linear: NF4Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(input, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] @ ctx.linear.weight, None


def _quantised(lines: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    whole = F.pad(lines, (0, -lines.shape[1] % NF4_BLOCK_SIZE)).contiguous()
    packed, state = quantize_4bit(whole, blocksize=NF4_BLOCK_SIZE, quant_type="nf4")
    return packed.view(len(lines), -1), state.absmax.float().view(len(lines), -1)


def cut_axes(model: nn.Module, sites: Iterable[Site]) -> Mapping[str, int]:
    """The linears that 4 bits hold, those with adapters, each with the axis that a cut by these sites may shorten."""
    consumers = {cut.module for site in sites for cut, axis in site.linear_slices() if axis == COLUMNS}
    return {name: COLUMNS if name in consumers else ROWS for name in lora_target_modules(model)}


def quantize_linears_to_nf4(
    model: nn.Module, sites: Iterable[Site], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Put every linear that gets adapters onto `device` in 4 bits, one after the other, in place.

    The rest of the model (embeddings, head, norms, experts) stays where and as it is. Sites are those of the model
    before, see `find_sites`.
    """
    for name, lines in cut_axes(model, sites).items():
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent), child,
            NF4Linear.from_linear(get_base_linear(model, name), cut_axis=lines, dtype=dtype, device=device),
        )  # fmt: skip


@torch.no_grad()
def round_linears_to_nf4(model: nn.Module, sites: Iterable[Site], *, dtype: torch.dtype, device: torch.device) -> None:
    """Give every linear the values that `hold_in_four_bits` would hold, as ordinary weights in place.

    `dtype` and `device` as of the run whose base is meant: what its adapters were tuned on.
    """
    for name, lines in cut_axes(model, sites).items():
        linear = get_base_linear(model, name)
        linear.weight.copy_(round_to_nf4(linear, linear.weight, cut_axis=lines, dtype=dtype, device=device))


def round_to_nf4(
    linear: nn.Module, weight: Tensor, *, cut_axis: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What 4 bits hold of a weight that this linear has, or will have: of its shape, in `dtype` on `device`."""
    held = NF4Linear(as_out_in(linear, weight.detach()).to(device, dtype), None, cut_axis=cut_axis, dtype=dtype)
    return as_out_in(linear, held.weight)


def has_nf4_linears(model: nn.Module) -> bool:
    """Whether any linear is held in 4 bits."""
    return any(isinstance(module, NF4Linear) for module in model.modules())
