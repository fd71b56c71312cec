"""Small models and recipes whose memory and FLOPs are measured; a counter of live tensors."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.pruning.nf4 import quantize_linears_to_nf4
from prunetune.pruning.sites import find_sites
from support.models import tiny

LENGTH, VOCABULARY = 128, 512
SIZES: Mapping[str, Any] = {
    "hidden_size": 96, "intermediate_size": 384, "head_dim": 12, "groups": 4, "layers": 4, "vocab_size": VOCABULARY,
}  # fmt: skip
CPU = torch.device("cpu")


class LiveMemoryCounter(TorchDispatchMode):
    """Counts the bytes of newly allocated tensors, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_by_storage: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.bytes_by_storage:
                    self.bytes_by_storage[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.bytes_by_storage.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.bytes_by_storage.values()))
        return result


def config_of(**changes: Any) -> RunConfig:
    train = {"batch_size": 1, "checkpointing": changes.pop("checkpointing", "off")}
    lora = {"rank": 8, "quantize": changes.pop("quantize", "off")}
    return from_mapping({
        "train": train, "lora": lora, "budget": {"keep": 1.0},
        "distill": {"teacher": changes.pop("teacher", "none"), "logits": 1.0, "hidden": 1.0}
        | {"share": float(changes.pop("share", 0))},
        "search": {"method": changes.pop("method", "generator")},
    })  # fmt: skip


def build_model(config: RunConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    model = tiny(**SIZES).to(dtype).requires_grad_(False)
    sites = find_sites(model)
    if config.lora.quantize != "off":
        quantize_linears_to_nf4(model, sites, dtype=dtype, device=CPU)
    return model, sites


def skip_without_bitsandbytes(quantize: str) -> None:
    if quantize != "off" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: pip install 'prunetune[quant]'")
