"""Blocks and layers that go as a whole: what stands in their place, and how layers leave the stack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.plan import Plan
from prunetune.pruning.families import architecture_info, get_family
from prunetune.pruning.linears import ROWS, axis_size, get_base_linear
from prunetune.pruning.units import Site, surviving_layers


class RemovedAttention(nn.Module):
    """Stands where a layer lost its last KV group: attends to nothing and adds nothing, or a constant [hidden]."""

    def __init__(self, constant: Tensor | None = None) -> None:
        super().__init__()
        self.constant = None if constant is None else nn.Parameter(constant.detach().clone(), requires_grad=False)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """[..., hidden] -> zeros of the same shape, or the constant at each place, and no attention weights."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing if self.constant is None else nothing + self.constant.to(nothing.dtype)), None


class ResidualPassthrough(nn.Module):
    """The same where attention is handed the residual and gives it back: Bloom."""

    def forward(self, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """The residual, and no attention weights."""
        return residual, None


class RemovedLinear(nn.Module):
    """Stands where a linear was: zeros, as many as the next one is to read."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., columns] -> zeros [..., rows]."""
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.rows)


class RemovedMixture(nn.Module):
    """Stands where a mixture of experts was: zeros, and no router scores where the block gave them."""

    def __init__(self, *, scores: bool) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, hidden_states: Tensor) -> Any:
        """[..., hidden] -> zeros of the same shape."""
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.scores else nothing


def remove_block(model: Any, site: Site) -> None:
    """Empty a block, or both blocks of a layer, so that it adds nothing; in place."""
    coupling = architecture_info(model)
    prefix, family = coupling.layer_prefixes[site.layer], coupling.family
    if site.kind in ("attention-blocks", "layers"):
        _put(
            model,
            f"{prefix}.{coupling.attention_name}",
            ResidualPassthrough() if family.adds_residual else RemovedAttention(),
        )
    if site.kind == "attention-blocks":
        return
    mixture, layer = family.mixture, model.get_submodule(prefix)
    if mixture and hasattr(layer.get_submodule(mixture.block), mixture.experts.rpartition(".")[2]):
        _put(model, f"{prefix}.{mixture.block}", RemovedMixture(scores=mixture.returns_scores))
        return
    block = coupling.mlp
    assert block is not None
    for name in block.producers:
        _put(model, f"{prefix}.{name}", RemovedLinear(0))
    consumer = f"{prefix}.{block.consumer}"
    _put(model, consumer, RemovedLinear(axis_size(get_base_linear(model, consumer), ROWS)))


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def remove_layers(model: Any, plan: Plan, sites: Iterable[Site]) -> None:
    """Layers that the plan closes leave the list, and those behind move up; the configuration follows, in place."""
    sites = tuple(sites)
    total = model.config.num_hidden_layers
    left = list(surviving_layers(plan, sites))
    if not any(site.kind == "layers" for site in sites) or len(left) == total:
        return
    place = architecture_info(model).layer_prefixes[0].rpartition(".")[0]
    layers = [model.get_submodule(place)[index] for index in left]
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module.__dict__.get("layer_idx"), int):
                module.layer_idx = index
    _put(model, place, nn.ModuleList(layers))
    remove_layers_from_config(model.config, left)


def remove_layers_from_config(config: Any, kept_layers: Sequence[int]) -> None:
    """A configuration of the layers that are left, in place: their number, and every list of one entry a layer."""
    total = config.num_hidden_layers
    if get_family(config).mixture and hasattr(config, "mlp_only_layers"):
        plain = [i for i in range(total) if i in config.mlp_only_layers or (i + 1) % config.decoder_sparse_step]
        config.mlp_only_layers = [place for place, index in enumerate(kept_layers) if index in plain]
        config.decoder_sparse_step = 1
    for name, value in list(vars(config).items()):
        if "layer" in name and name != "mlp_only_layers" and isinstance(value, list) and len(value) == total:
            setattr(config, name, [value[index] for index in kept_layers])
    config.num_hidden_layers = len(kept_layers)
