"""A fused forward pass of a linear with its LoRA adapter: y = W x + b + s B A x.

peft computes B A x, scales it and adds it: three more tensors of the output's size, written and read, and as many in
the backward pass. Here the product with B is added to W x in one kernel (addmm). If the base is a frozen linear without
hooks, so are the two gradients of x, which autograd would compute one by one and add.

Shapes: N rows of input, R the adapter's rank.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Products of 16-bit factors can be returned in 32 bits, in which they are summed: on NVIDIA GPUs, since PyTorch 2.8.
HAS_MIXED_DTYPE_MM = torch.version.cuda is not None and hasattr(torch.ops.aten.mm, "dtype")


def use_fused_forward(layer: Any, name: str) -> None:
    """Give a peft LoRA layer this forward, in place, for its one adapter `name`; a layer with dropout keeps peft's."""
    if isinstance(layer.lora_dropout[name], nn.Identity):
        layer.forward = functools.partial(_fused_forward, layer, name)


def _fused_forward(layer: Any, name: str, x: Tensor) -> Tensor:
    """[..., in] -> [..., out]."""
    linear, scale = layer.base_layer, layer.scaling[name]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    casts = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if casts else x.dtype  # that a linear computes in
    accepted = (dtype, torch.float32) if casts else (dtype,)
    is_accepted = x.dim() > 1 and all(tensor.dtype in accepted for tensor in (x, down, up))
    if is_accepted and _is_plain(linear, dtype):
        inputs = x.flatten(0, -2).to(dtype)
        rows: Tensor = _FusedLora.apply(inputs, linear.weight, linear.bias, down, up, scale)  # type: ignore[no-untyped-call]
        return rows.view(*x.shape[:-1], len(up))
    base = linear(x)
    low = F.linear(x, down)
    rows = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale)
    return rows.view_as(base)


def _is_plain(linear: Any, dtype: torch.dtype) -> bool:
    """Whether calling it is W x + b with frozen, unsharded weights of that dtype, and nothing else.

    Checked at every call: gates are hooks that are added and removed.
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


class _FusedLora(torch.autograd.Function):
    """[N, in] -> [N, out] in the dtype of x and W; gradients of A and B are in theirs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        ctx.scale, ctx.dtypes = scale, (down.dtype, up.dtype)
        down, up = down.to(x.dtype), up.to(x.dtype)
        low = _scaled_product(x, down.t(), scale)
        _, _, _, tunes_down, tunes_up, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if tunes_down else None, low if tunes_up else None, weight, down, up)
        return F.linear(x, weight, bias).addmm_(low, up.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        tunes_x, _, _, tunes_down, tunes_up, _ = ctx.needs_input_grad
        x_gradient = down_gradient = up_gradient = None
        with torch.autocast(upstream[0].device.type, enabled=False):
            if tunes_x or tunes_down:
                low_gradient = _scaled_product(upstream[0], up, ctx.scale)
            if tunes_x:
                x_gradient = (upstream[0] @ weight).addmm_(low_gradient, down)
            if tunes_down:
                down_gradient = _product(low_gradient.t(), x, ctx.dtypes[0])
            if tunes_up:
                up_gradient = _product(upstream[0].t(), low, ctx.dtypes[1])
        return x_gradient, None, None, down_gradient, up_gradient, None


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """left @ right * scale, in one kernel; with beta 0 the empty tensor's values do not count."""
    return left.new_empty(len(left), right.shape[1]).addmm_(left, right, beta=0, alpha=scale)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, which is the factors' or float32."""
    if HAS_MIXED_DTYPE_MM and left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
