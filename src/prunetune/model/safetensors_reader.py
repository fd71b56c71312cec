"""Which .safetensors files are a model's, and reading single tensors from them without loading the model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from prunetune.errors import ModelError
from prunetune.utils.untrusted import parse_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def safetensors_files(folder: Path) -> list[Path]:
    """The .safetensors files of a model folder that transformers reads, whether they are there or not.

    That is the file that config.json names, else `model.safetensors`, else those of the index. Other files, such as
    left-overs of an earlier save, are not read. Raises `ModelError` for an index that is none.
    """
    names = [WEIGHTS_FILE, INDEX_FILE]
    if (config := folder / "config.json").is_file() and (named := _json_object(config).get("transformers_weights")):
        names = [str(named)]
    first = next((folder / name for name in names if (folder / name).is_file()), None)
    if first is None or first.suffix == ".safetensors":
        return [first] if first else []
    weight_map = _json_object(first).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{first} names no files (weight_map); copy the folder again, or fetch it again")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _json_object(file: Path) -> dict[str, object]:
    try:
        values = parse_json(file.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"it holds no object but {type(values).__name__}")
    except ValueError as broken:
        raise ModelError(f"{file} cannot be read: {broken}; copy the folder again, or fetch it again") from broken
    return values


@dataclass(frozen=True)
class SafetensorsReader:
    """The tensors of a model's files."""

    files: dict[str, Path]  # tensor name -> the file that holds it
    dtype: torch.dtype  # of the checkpoint

    @classmethod
    def from_files(cls, files: Iterable[Path], dtype: torch.dtype = torch.float32) -> Self:
        """Find the tensors in files; raises `SafetensorError` or `OSError` for one that cannot be read."""
        found: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        return cls(found, dtype)

    def has_all(self, names: Iterable[str]) -> bool:
        return all(name in self.files for name in names)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype."""
        with safe_open(self.files[name], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
        return tensor

    def has_own_head(self, head: str, embedding: str) -> bool:
        """Whether both are stored, and differ: transformers then does not tie them, whatever config.json says."""
        if not self.has_all((head, embedding)):
            return False
        return not torch.equal(self.tensor(head), self.tensor(embedding))


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in place of a weight, which becomes frozen, or of a buffer."""
    owner_name, _, attribute = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[attribute] = tensor
