"""Cuts a model that does not fit into memory: one layer after another is read, gated, run, cut and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunetune.export.selfcheck import compute_logits
from prunetune.model.safetensors_reader import SafetensorsReader, set_tensor
from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.families import architecture_info
from prunetune.pruning.masking import masked
from prunetune.pruning.units import Site, UnitKind, surviving_layers
from prunetune.pruning.whole_blocks import remove_layers

INDEX_FILE = "model.safetensors.index.json"
WeightMerger = Callable[[str, Tensor], Tensor]  # a weight's name and float32 value -> its value as tuned


@dataclass
class ShardWriter:
    """Writes the weight files of a checkpoint one by one, then their index."""

    folder: Path
    count: int  # of files in all
    tensor_files: dict[str, str] = field(default_factory=dict)  # tensor name -> file name
    bytes: int = 0
    files: int = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write the next file."""
        self.files += 1
        file = f"model-{self.files:05d}-of-{self.count:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.folder / file, {"format": "pt"})
        self.tensor_files |= dict.fromkeys(tensors, file)
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.tensor_files.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class StreamedModel:
    """A model that has the weights of one layer at a time, besides those outside layers (embedding, norm, head)."""

    model: Any  # weights on the meta device, see `load_empty_model`
    stored: SafetensorsReader
    merge: WeightMerger

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of the files, those read and those written."""
        return self.stored.dtype

    def load(self, module: nn.Module, prefix: str) -> None:
        """Load a module's weights in float32: stored values with their adapters, rounded to the storage dtype."""
        for name, empty in [*module.named_parameters(), *module.named_buffers()]:
            stored_name = prefix + name
            if stored_name not in self.stored.files:
                continue  # a buffer that the class computes from the configuration
            tensor = self.stored.tensor(stored_name)
            if empty.is_floating_point():
                tensor = self.merge(stored_name, tensor.float()).to(self.storage_dtype).float()
            set_tensor(module, name, tensor)

    def drop(self, module: nn.Module) -> None:
        """Free the weights of a module; their shapes remain."""
        for name, weight in list(module.named_parameters()):
            dtype = self.storage_dtype if weight.is_floating_point() else weight.dtype
            set_tensor(module, name, torch.empty(weight.shape, dtype=dtype, device="meta"))

    def to_storage_dtype(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state with floating-point tensors in the storage dtype."""
        dtype = self.storage_dtype
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def cut_streamed(streamed: StreamedModel, plan: Plan, sites: Sequence[Site], tokens: Tensor, folder: Path) -> Tensor:
    """Write the cut model's weights into `folder`; returns the logits of the gated model at `tokens`, [B, T, V].

    The model ends up cut and without weights. The files are those of `masked` followed by `cut`.
    """
    model, prefixes = streamed.model, architecture_info(streamed.model).layer_prefixes
    new_prefixes = {prefix: prefix for prefix in prefixes}  # of the layers that are kept, once the others are removed
    if any(site.kind is UnitKind.LAYER for site in sites):
        new_prefixes = {prefixes[old]: prefixes[new] for new, old in enumerate(surviving_layers(plan, sites))}
    shards = ShardWriter(folder, len(new_prefixes) + 1)
    outside = [module for name, module in model.named_modules() if not _is_in_layer(name, prefixes)]
    _load_non_layer_weights(streamed, prefixes)
    handles = []

    def cut_and_write_after(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, *_: Any) -> None:
            cut_linears(model, plan, sites=[site for site in sites if site.layer == index])
            if new_prefix := new_prefixes.get(prefixes[index]):
                state = {f"{new_prefix}.{name}": tensor for name, tensor in layer.state_dict().items()}
                shards.add(streamed.to_storage_dtype(state))
            streamed.drop(layer)

        return hook

    with masked(model, plan, sites=sites):
        for index, prefix in enumerate(prefixes):
            layer = model.get_submodule(prefix)
            handles.append(
                layer.register_forward_pre_hook(lambda layer, _, prefix=prefix: streamed.load(layer, f"{prefix}."))
            )
            handles.append(layer.register_forward_hook(cut_and_write_after(index)))
        try:
            logits = compute_logits(model, tokens)
        finally:
            for handle in handles:
                handle.remove()
    shards.add(streamed.to_storage_dtype(_non_layer_state(model, prefixes)))
    shards.finish()
    for module in outside:
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                set_tensor(module, name, torch.empty(weight.shape, dtype=streamed.storage_dtype, device="meta"))
    model.tie_weights()
    remove_layers(model, plan, sites)
    return logits


def _load_non_layer_weights(streamed: StreamedModel, prefixes: Sequence[str]) -> None:
    for name, empty in [*streamed.model.named_parameters(), *streamed.model.named_buffers()]:
        if not _is_in_layer(name, prefixes) and name in streamed.stored.files:
            tensor = streamed.stored.tensor(name)
            if empty.is_floating_point():
                tensor = tensor.to(streamed.storage_dtype).float()
            set_tensor(streamed.model, name, tensor)
    streamed.model.tie_weights()


def _non_layer_state(model: Any, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors outside layers that a checkpoint stores; of tied weights the first."""
    state: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not _is_in_layer(name, prefixes) and id(tensor) not in stored:
            stored.add(id(tensor))
            state[name] = tensor.detach()
    return state


def _is_in_layer(name: str, prefixes: Sequence[str]) -> bool:
    return f"{name}.".startswith(tuple(f"{prefix}." for prefix in prefixes))
