"""A model's weights as they lie in its files, one at a time: for models that are never in one memory as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunetune.model.loading import checkpoint_dtype, load_config, weight_files


@dataclass(frozen=True)
class SafetensorsReader:
    """Tensor name -> the .safetensors file that holds it."""

    files: dict[str, Path]
    dtype: torch.dtype

    @classmethod
    def from_model(cls, name: str, *, trust_remote_code: bool = False) -> SafetensorsReader:
        """Of a model's name; empty where its files are not of this kind."""
        places: dict[str, Path] = {}
        for file in weight_files(name):
            try:
                with safe_open(file, framework="pt") as tensors:
                    places |= dict.fromkeys(tensors.keys(), file)
            except (SafetensorError, OSError):
                return cls({}, torch.float32)
        return cls(places, checkpoint_dtype(name, trust_remote_code=trust_remote_code))

    def has_all(self, names: Iterable[str]) -> bool:
        """Whether all of these are stored under these names."""
        return all(name in self.files for name in names)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as stored."""
        with safe_open(self.files[name], framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found


def load_empty_model(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model without its weights, which are on the meta device; for arithmetic in float32."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Another tensor in place of a weight or a buffer."""
    place, _, own = name.rpartition(".")
    holder = module.get_submodule(place)
    if own in holder._parameters:
        holder._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        holder._buffers[own] = tensor
