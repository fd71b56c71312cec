"""Bytes that models hold in memory together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def memory_of(*models: Any) -> int:
    """Bytes of all storages of weights and buffers, each counted once; without adapters."""
    tensors: Iterable[tuple[str, Tensor]] = (
        pair for model in models for pair in (*model.named_parameters(), *model.named_buffers())
    )
    storages = (tensor.untyped_storage() for name, tensor in tensors if ".lora_" not in name)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
