"""Removing whole blocks and layers: the empty modules that replace blocks, and the removal of layers from the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.families import architecture_info, get_family
from prunetune.pruning.linears import ROWS, axis_size, get_base_linear
from prunetune.pruning.units import Site, UnitKind, surviving_layers


class RemovedAttention(nn.Module):
    """Replaces attention that has no KV group left: its output is zero, or a constant [hidden]."""

    def __init__(self, constant: Tensor | None = None) -> None:
        super().__init__()
        self.constant = None if constant is None else nn.Parameter(constant.detach().clone(), requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[..., hidden] -> (zeros of the same shape, or the constant at each position; no attention weights)."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros if self.constant is None else zeros + self.constant.to(zeros.dtype)), None


class ResidualPassthrough(nn.Module):
    """Replaces attention that takes the residual and returns the sum: Bloom's."""

    def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """(The residual; no attention weights)."""
        return residual, None


class RemovedLinear(nn.Module):
    """Replaces a linear: its output is zeros, as many as the next linear reads."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., columns] -> zeros [..., rows]."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.rows)


class RemovedMixture(nn.Module):
    """Replaces a mixture of experts: its output is zeros, with None for router scores if the block returned them."""

    def __init__(self, *, scores: bool) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, hidden_states: Tensor) -> Any:
        """[..., hidden] -> zeros of the same shape."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.scores else zeros


def remove_block(model: Any, site: Site) -> None:
    """Empty a block, or both blocks of a layer, in place, so that nothing is added to the residual."""
    architecture = architecture_info(model)
    prefix, family = architecture.layer_prefixes[site.layer], architecture.family
    if site.kind.removes_attention:
        empty = ResidualPassthrough() if family.adds_residual else RemovedAttention()
        replace_module(model, f"{prefix}.{architecture.attention_name}", empty)
    if not site.kind.removes_mlp:
        return
    mixture, layer = family.mixture, model.get_submodule(prefix)
    if mixture and hasattr(layer.get_submodule(mixture.block), mixture.experts.rpartition(".")[2]):
        replace_module(model, f"{prefix}.{mixture.block}", RemovedMixture(scores=mixture.returns_scores))
        return
    block = architecture.mlp
    assert block is not None
    for name in block.producers:
        replace_module(model, f"{prefix}.{name}", RemovedLinear(0))
    consumer = f"{prefix}.{block.consumer}"
    replace_module(model, consumer, RemovedLinear(axis_size(get_base_linear(model, consumer), ROWS)))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in a submodule's place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def remove_layers(model: Any, plan: Plan, sites: Iterable[Site]) -> None:
    """Remove the layers that the plan removes from the model's list and its configuration, in place."""
    sites = tuple(sites)
    total = model.config.get_text_config().num_hidden_layers
    kept_layers = list(surviving_layers(plan, sites))
    if not any(site.kind is UnitKind.LAYER for site in sites) or len(kept_layers) == total:
        return
    list_name = architecture_info(model).layer_prefixes[0].rpartition(".")[0]
    layers = [model.get_submodule(list_name)[index] for index in kept_layers]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = index
    replace_module(model, list_name, nn.ModuleList(layers))
    remove_layers_from_config(model.config.get_text_config(), kept_layers)


def remove_layers_from_config(config: Any, kept_layers: Sequence[int]) -> None:
    """Set the number of layers, and shorten every list with one entry a layer, in place."""
    total = config.num_hidden_layers
    if get_family(config).mixture and hasattr(config, "mlp_only_layers"):
        # Layers with experts are counted by their index, which changes: name those without experts instead.
        plain = [i for i in range(total) if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step]
        config.mlp_only_layers = [new_index for new_index, index in enumerate(kept_layers) if index in plain]
        config.decoder_sparse_step = 1
    for name, value in list(vars(config).items()):
        if "layer" in name and name != "mlp_only_layers" and isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[index] for index in kept_layers])
    overrides = config.to_dict().get("per_layer_config", {}) if config.is_heterogeneous else {}
    config.num_hidden_layers = len(kept_layers)
    if overrides:
        by_layer = {int(layer): values for layer, values in overrides.items()}
        config.per_layer_config = {new: by_layer.get(old, {}) for new, old in enumerate(kept_layers)}
