"""Reading single tensors from a model's .safetensors files, for models that are too large to load whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunetune.model.checksums import verify_checksums
from prunetune.model.loading import checkpoint_dtype, load_config, resolve_model_path, weight_files


@dataclass(frozen=True)
class SafetensorsReader:
    """The tensors of a model's files."""

    files: dict[str, Path]  # tensor name -> the file that holds it
    dtype: torch.dtype  # of the checkpoint

    @classmethod
    def from_model(cls, name: str, *, trust_remote_code: bool = False) -> SafetensorsReader:
        """Find the tensors of a model; none where its weights are no readable .safetensors files."""
        verify_checksums(Path(resolve_model_path(name)))
        files: dict[str, Path] = {}
        for file in weight_files(name):
            try:
                with safe_open(file, framework="pt") as tensors:
                    files |= dict.fromkeys(tensors.keys(), file)
            except (SafetensorError, OSError):
                return cls({}, torch.float32)
        return cls(files, checkpoint_dtype(name, trust_remote_code=trust_remote_code))

    def has_all(self, names: Iterable[str]) -> bool:
        return all(name in self.files for name in names)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype."""
        with safe_open(self.files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor


def load_empty_model(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model in float32, with weights on the meta device and buffers in memory."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of a weight, which becomes frozen, or of a buffer."""
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[attribute] = tensor
