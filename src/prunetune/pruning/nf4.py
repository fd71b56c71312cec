"""Linears with frozen weights in 4 bits (nf4): the base of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

nf4 rounds blocks of 64 weights, each by a scale of its own. Here every block lies inside one row or column that a cut
keeps or removes whole: blocks run along the rows of producers, which lose rows, and along the columns of consumers,
which lose columns. So a unit leaves with whole blocks, every other bit is kept, and cutting a quantised model is exact.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunetune.pruning.linears import COLUMNS, ROWS, as_out_in, get_base_linear, replace_module, set_axis_size
from prunetune.pruning.sites import lora_target_modules
from prunetune.pruning.units import Site
from prunetune.utils.optional import require_installed

NF4_BLOCK_SIZE = 64  # weights that share a scale
NF4_SCALE_BYTES = 4  # float32


def require_nf4() -> None:
    """Raises `MissingPackage` if bitsandbytes, which has the kernels, is not installed."""
    require_installed("bitsandbytes", extra="quant", use="lora.quantize nf4")


class NF4Linear(nn.Linear):
    """A frozen linear in nf4. `weight` is dequantised whenever it is read, and cannot be set.

    Shapes: L rows or columns along the axis that a cut shortens.
    """

    packed: Tensor  # uint8 [L, bytes]: two weights a byte, padded with zeros to whole blocks
    scales: Tensor  # float32 [L, blocks]

    def __init__(self, weight: Tensor, bias: Tensor | None, *, cut_axis: int, dtype: torch.dtype) -> None:
        """Quantise a weight [out, in]; `dtype` is that of the arithmetic."""
        from bitsandbytes.functional import quantize_4bit

        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.cut_axis, self.dtype = cut_axis, dtype
        weight = weight if cut_axis == ROWS else weight.t()  # [L, length]
        padded = F.pad(weight, (0, -weight.shape[1] % NF4_BLOCK_SIZE)).contiguous()
        packed, state = quantize_4bit(padded, blocksize=NF4_BLOCK_SIZE, quant_type="nf4")
        self.register_buffer("packed", packed.view(len(weight), -1))
        self.register_buffer("scales", state.absmax.float().view(len(weight), -1))
        self.bias: Any = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: Any, *, cut_axis: int, dtype: torch.dtype, device: torch.device) -> Self:
        """A linear or Conv1D in 4 bits on a device, which for a moment also holds its weight in `dtype`."""
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
        """Keep these rows or columns, in place; raises `ValueError` on an axis other than `cut_axis`."""
        if axis != self.cut_axis:
            raise ValueError(f"blocks of 4-bit weights run along axis {axis}: only axis {self.cut_axis} can be cut")
        self.packed, self.scales = self.packed.index_select(0, index), self.scales.index_select(0, index)
        if axis == ROWS and self.bias is not None:
            self.bias = nn.Parameter(self.bias.index_select(0, index), requires_grad=False)
        set_axis_size(self, axis, len(index))

    def dequantize(self) -> nn.Linear:
        """The ordinary linear with the values held in 4 bits."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.weight.contiguous(), requires_grad=False), self.bias
        return linear

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move to a device or dtype as any module, but keep the scales in float32."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.packed.device)
        return self


class _Multiply(torch.autograd.Function):
    """x W^T + b. Forward and backward free the dequantised weight after its product."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, linear: NF4Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(input, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] @ ctx.linear.weight, None


def cut_axes(model: nn.Module, sites: Iterable[Site]) -> Mapping[str, int]:
    """{linear with adapters: the axis that a cut of these sites shortens}. These are the linears held in 4 bits."""
    consumers = {linear.module for site in sites for linear, axis in site.linear_slices() if axis == COLUMNS}
    return {name: COLUMNS if name in consumers else ROWS for name in lora_target_modules(model)}


def quantize_linears_to_nf4(
    model: nn.Module, sites: Iterable[Site], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace every linear that gets adapters by one in 4 bits on a device, one after the other, in place.

    Embeddings, head, norms and experts stay on their device, in their dtype. The sites are those that `find_sites`
    found before.
    """
    for name, axis in cut_axes(model, sites).items():
        linear = NF4Linear.from_linear(get_base_linear(model, name), cut_axis=axis, dtype=dtype, device=device)
        replace_module(model, name, linear)


def round_to_nf4(
    linear: nn.Module, weight: Tensor, *, cut_axis: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The 4-bit values of a weight as this linear stores it, in `dtype` on `device`."""
    quantized = NF4Linear(as_out_in(linear, weight.detach()).to(device, dtype), None, cut_axis=cut_axis, dtype=dtype)
    return as_out_in(linear, quantized.weight)


def has_nf4_linears(model: nn.Module) -> bool:
    """Whether any linear holds its weight in 4 bits."""
    return any(isinstance(module, NF4Linear) for module in model.modules())
