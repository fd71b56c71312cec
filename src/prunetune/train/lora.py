"""The forward pass of a linear with its LoRA adapter: y = W x + s B A x, in as few tensors as can be.

peft computes B A x, scales it and adds it: three tensors more of the output's size, written and read, and one backward.
Here the product with B is added onto W x as it is made, as gemm of BLAS can.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def simplify(layer: Any, name: str) -> None:
    """Give a peft LoRA layer this forward, in place, for its one adapter `name`; layers with dropout keep their own."""
    if isinstance(layer.lora_dropout[name], nn.Identity):
        layer.forward = types.MethodType(_forward_of(name), layer)


def _forward_of(name: str) -> Any:
    def forward(layer: Any, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        base = layer.base_layer(x)
        low = F.linear(x, layer.lora_A[name].weight)
        rows = torch.addmm(
            base.flatten(0, -2), low.flatten(0, -2), layer.lora_B[name].weight.t(), alpha=layer.scaling[name]
        )
        return rows.view_as(base)

    return forward
