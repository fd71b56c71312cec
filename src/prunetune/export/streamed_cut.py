"""The cut of a model that is never in memory as a whole: layer after layer is read, gated, run, cut and written."""

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
from prunetune.pruning.units import Site, surviving_layers
from prunetune.pruning.whole_blocks import remove_layers

INDEX_FILE = "model.safetensors.index.json"
AdapterMerger = Callable[[str, Tensor], Tensor]  # a weight's name, float32 -> with what its adapter adds


@dataclass
class ShardWriter:
    """Files of a checkpoint, written one by one; the index says what is where."""

    folder: Path
    count: int
    tensor_files: dict[str, str] = field(default_factory=dict)  # tensor -> file
    bytes: int = 0
    files: int = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """The next file."""
        self.files += 1
        name = f"model-{self.files:05d}-of-{self.count:05d}.safetensors"
        save_file({key: one.contiguous() for key, one in tensors.items()}, self.folder / name, {"format": "pt"})
        self.tensor_files |= dict.fromkeys(tensors, name)
        self.bytes += sum(one.numel() * one.element_size() for one in tensors.values())

    def finish(self) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(self.tensor_files.items()))}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class StreamedModel:
    """A model of which one layer has weights at a time, beside embedding, norm and head."""

    model: Any  # weights on the meta device, see `skeleton`
    stored: SafetensorsReader
    merge_adapter: AdapterMerger

    @property
    def storage_dtype(self) -> torch.dtype:
        """Of the files, those read and those written."""
        return self.stored.dtype

    def load(self, module: nn.Module, prefix: str) -> None:
        """Weights of a module: as stored, with their adapters, rounded to what a file will hold; float32."""
        for name, before in [*module.named_parameters(), *module.named_buffers()]:
            full = prefix + name
            if full not in self.stored.files:
                continue  # computed from the configuration
            tensor = self.stored.tensor(full)
            if before.is_floating_point():
                tensor = self.merge_adapter(full, tensor.float()).to(self.storage_dtype).float()
            set_tensor(module, name, tensor)

    def drop(self, module: nn.Module) -> None:
        """Forget the weights of a module, not their shapes."""
        for name, before in list(module.named_parameters()):
            dtype = self.storage_dtype if before.is_floating_point() else before.dtype
            set_tensor(module, name, torch.empty(before.shape, dtype=dtype, device="meta"))

    def to_storage_dtype(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As files hold it."""
        return {name: one.to(self.storage_dtype) if one.is_floating_point() else one for name, one in state.items()}


def cut_streamed(streamed: StreamedModel, plan: Plan, sites: Sequence[Site], tokens: Tensor, folder: Path) -> Tensor:
    """Write the cut model's weights into `folder`; returns the logits of the gated model at `tokens`, [B, T, V].

    The model ends up cut and without weights. Equals `masked`, then `cut`.
    """
    model, prefixes = streamed.model, architecture_info(streamed.model).layer_prefixes
    names = _renumbered_prefixes(prefixes, plan, sites)
    shards = ShardWriter(folder, len(names) + 1)
    outside = [module for name, module in model.named_modules() if not _is_in_layer(name, prefixes)]
    _load_non_layer_weights(streamed, prefixes)
    handles = []

    def load(index: int) -> Callable[..., None]:
        return lambda layer, *_: streamed.load(layer, f"{prefixes[index]}.")

    def leave(index: int) -> Callable[..., None]:
        def done(layer: nn.Module, *_: Any) -> None:
            cut_linears(model, plan, sites=[site for site in sites if site.layer == index])
            if prefixes[index] in names:
                new = names[prefixes[index]]
                shards.add(streamed.to_storage_dtype({f"{new}.{key}": one for key, one in layer.state_dict().items()}))
            streamed.drop(layer)

        return done

    with masked(model, plan, sites=sites):
        for index, prefix in enumerate(prefixes):
            layer = model.get_submodule(prefix)
            handles += [layer.register_forward_pre_hook(load(index)), layer.register_forward_hook(leave(index))]
        try:
            logits = compute_logits(model, tokens)
        finally:
            for handle in handles:
                handle.remove()
    shards.add(streamed.to_storage_dtype(_non_layer_state(model, prefixes)))
    shards.finish()
    for module in outside:
        for name, one in list(module._parameters.items()):
            if one is not None:
                set_tensor(module, name, torch.empty(one.shape, dtype=streamed.storage_dtype, device="meta"))
    model.tie_weights()
    remove_layers(model, plan, sites)
    return logits


def _load_non_layer_weights(streamed: StreamedModel, prefixes: Sequence[str]) -> None:
    for name, before in [*streamed.model.named_parameters(), *streamed.model.named_buffers()]:
        if not _is_in_layer(name, prefixes) and name in streamed.stored.files:
            tensor = streamed.stored.tensor(name)
            set_tensor(
                streamed.model,
                name,
                tensor.to(streamed.storage_dtype).float() if before.is_floating_point() else tensor,
            )
    streamed.model.tie_weights()


def _non_layer_state(model: Any, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """What is stored of all that is in no layer; of tied weights the first."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, one in model.state_dict(keep_vars=True).items():
        if not _is_in_layer(name, prefixes) and id(one) not in seen:
            seen.add(id(one))
            found[name] = one.detach()
    return found


def _is_in_layer(name: str, prefixes: Sequence[str]) -> bool:
    return f"{name}.".startswith(tuple(f"{prefix}." for prefix in prefixes))


def _renumbered_prefixes(prefixes: Sequence[str], plan: Plan, sites: Sequence[Site]) -> dict[str, str]:
    """Layers that stay, and what they are called once the others are gone."""
    if not any(site.kind == "layers" for site in sites):
        return {prefix: prefix for prefix in prefixes}
    return {prefixes[old]: prefixes[new] for new, old in enumerate(surviving_layers(plan, sites))}
