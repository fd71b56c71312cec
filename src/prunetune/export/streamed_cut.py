"""Cuts a model that does not fit into memory: one layer after another is read, gated, run, cut and written."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prunetune.export.selfcheck import compute_logits
from prunetune.model.safetensors_reader import INDEX_FILE, SafetensorsReader, set_tensor
from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears, remove_layers
from prunetune.pruning.families import architecture_info
from prunetune.pruning.masking import masked
from prunetune.pruning.units import Site, UnitKind, surviving_layers

WeightMerger = Callable[[str, Tensor], Tensor]  # a weight's name and float32 value -> its value as tuned


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

    def load(self, module: nn.Module, prefix: str = "", skip: Sequence[str] = ()) -> None:
        """Load a module's weights in float32: stored values with their adapters, rounded to the storage dtype.

        Those of the layers named by `skip` stay as they are.
        """
        for name, empty in [*module.named_parameters(), *module.named_buffers()]:
            stored_name = prefix + name
            if stored_name not in self.stored.files or _is_in_layer(stored_name, skip):
                continue  # such as a buffer that the class computes from the configuration
            tensor = self.stored.tensor(stored_name)
            if empty.is_floating_point():
                tensor = self.merge(stored_name, tensor.float()).to(self.storage_dtype).float()
            set_tensor(module, name, tensor)

    def drop(self, module: nn.Module) -> None:
        """Free the weights of a module; their shapes remain."""
        for name, weight in list(module.named_parameters()):
            dtype = self.storage_dtype if weight.is_floating_point() else weight.dtype
            set_tensor(module, name, torch.empty(weight.shape, dtype=dtype, device="meta"))


def cut_streamed(streamed: StreamedModel, plan: Plan, sites: Sequence[Site], tokens: Tensor, folder: Path) -> Tensor:
    """Write the cut model's weights into `folder`; returns the logits of the gated model at `tokens`, [B, T, V].

    The model ends up cut and without weights. The files are those of `masked` followed by `cut`.
    """
    model, prefixes = streamed.model, architecture_info(streamed.model).layer_prefixes
    new_prefixes = {prefix: prefix for prefix in prefixes}  # of the layers that are kept, once the others are removed
    if any(site.kind is UnitKind.LAYER for site in sites):
        new_prefixes = {prefixes[old]: prefixes[new] for new, old in enumerate(surviving_layers(plan, sites))}
    tensor_files: dict[str, str] = {}
    sizes: list[int] = []  # bytes of the files so far

    def write_file(state: dict[str, Tensor]) -> None:
        dtype = streamed.storage_dtype
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        file = f"model-{len(sizes) + 1:05d}-of-{len(new_prefixes) + 1:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file, {"format": "pt"})
        tensor_files.update(dict.fromkeys(state, file))
        sizes.append(sum(tensor.nbytes for tensor in state.values()))

    def cut_and_write_after(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, *_: Any) -> None:
            cut_linears(model, plan, sites=[site for site in sites if site.layer == index])
            if new_prefix := new_prefixes.get(prefixes[index]):
                write_file({f"{new_prefix}.{name}": tensor for name, tensor in layer.state_dict().items()})
            streamed.drop(layer)

        return hook

    streamed.load(model, skip=prefixes)
    model.tie_weights()
    handles = []
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
    outside = {name: t for name, t in model.state_dict(keep_vars=True).items() if not _is_in_layer(name, prefixes)}
    first_names = {
        id(tensor): name for name, tensor in reversed(outside.items())
    }  # of tied weights the first is stored
    write_file({name: tensor.detach() for name, tensor in outside.items() if first_names[id(tensor)] == name})
    index_values = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(tensor_files.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index_values, indent=2) + "\n", encoding="utf-8")
    streamed.drop(model)
    model.tie_weights()
    remove_layers(model, plan, sites)
    return logits


def _is_in_layer(name: str, prefixes: Sequence[str]) -> bool:
    return f"{name}.".startswith(tuple(f"{prefix}." for prefix in prefixes))
