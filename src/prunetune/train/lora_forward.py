"""The forward pass of a linear with its LoRA adapter: y = W x + b + s B A x, in as few tensors as can be.

peft computes B A x, scales it and adds it: three tensors more of the output's size, written and read, and one backward.
Here the product with B is added onto W x as it is made, as gemm of BLAS can; and where the base is a frozen linear that
nobody else looks into, the same is done to the two gradients of x, which autograd would make one by one and add.

Shapes: N rows of all that comes in, R the adapter's rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Products of 16-bit factors can be written in 32 bits, as they are summed: only NVIDIA's, since PyTorch 2.8.
HAS_MIXED_DTYPE_MM = torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")


def use_fused_forward(layer: Any, name: str) -> None:
    """Give a peft LoRA layer this forward, in place, for its one adapter `name`; layers with dropout keep their own."""
    if isinstance(layer.lora_dropout[name], nn.Identity):
        layer.forward = types.MethodType(_forward_of(name), layer)


def _forward_of(name: str) -> Any:
    def forward(layer: Any, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        linear, scale = layer.base_layer, layer.scaling[name]
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        dtype = _dtype_at(x)
        if _is_bare(linear, dtype) and _accepts_dtypes(x, down, up, dtype=dtype):
            inputs = x.flatten(0, -2).to(dtype)
            rows: Tensor = _Adapted.apply(inputs, linear.weight, linear.bias, down, up, scale)  # type: ignore[no-untyped-call]
            return rows.view(*x.shape[:-1], len(up))
        base = linear(x)
        low = F.linear(x, down)
        rows = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale)
        return rows.view_as(base)

    return forward


def _dtype_at(x: Tensor) -> torch.dtype:
    """What a linear computes in, here and now."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _is_bare(linear: Any, dtype: torch.dtype) -> bool:
    """Whether calling it is W x + b with frozen weights of that dtype, whole and at hand, and nothing else.

    Asked at every call: gates are hooks, and come and go.
    """
    return (
        type(linear) is nn.Linear
        and "forward" not in vars(linear)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and not (linear._backward_hooks or linear._backward_pre_hooks)
        and all(
            type(weight) is nn.Parameter and weight.dtype == dtype and not weight.requires_grad
            for weight in (linear.weight, linear.bias)
            if weight is not None
        )
    )


def _accepts_dtypes(x: Tensor, *weights: Tensor, dtype: torch.dtype) -> bool:
    """Whether a linear may take these in that dtype, as they are or cast by autocast."""
    taken = (dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else (dtype,)
    return x.dim() > 1 and all(each.dtype in taken for each in (x, *weights))


class _Adapted(torch.autograd.Function):
    """[N, in] -> [N, out] in the dtype of x and W; gradients of A and B are in theirs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.scale, ctx.dtypes = scale, (down.dtype, up.dtype)
        down, up = down.to(x.dtype), up.to(x.dtype)
        low = _scaled(x, down.t(), scale)
        _, _, _, tunes_down, tunes_up, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if tunes_down else None, low if tunes_up else None, weight, down, up)
        return F.linear(x, weight, bias).addmm_(low, up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        passes_on, _, _, tunes_down, tunes_up, _ = ctx.needs_input_grad
        of_x = of_down = of_up = None
        with torch.autocast(upstream[0].device.type, enabled=False):
            if passes_on or tunes_down:
                of_low = _scaled(upstream[0], up, ctx.scale)
            if passes_on:
                of_x = (upstream[0] @ weight).addmm_(of_low, down)
            if tunes_down:
                of_down = _product(of_low.t(), x, ctx.dtypes[0])
            if tunes_up:
                of_up = _product(upstream[0].t(), low, ctx.dtypes[1])
        return of_x, None, None, of_down, of_up, None


def _scaled(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """The product times a number, in one kernel: what is in the tensor before does not count."""
    return one.new_empty(len(one), other.shape[1]).addmm_(one, other, beta=0, alpha=scale)


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """In that dtype, which is the factors' or float32."""
    if HAS_MIXED_DTYPE_MM and one.is_cuda and one.dtype != dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)
