"""Where frozen weights are: whole on every rank, or sharded by FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

Sharded is each decoder layer, and the embedding where it is not the head's. Every rank has adapters, norms between
layers and the head whole: adapters are what optimiser and cut work on, the head is read outside the model's forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.families import architecture_info
from prunetune.pruning.shared_weights import cut_sharing_weights
from prunetune.pruning.units import Site
from prunetune.train.parallel.ranks import Ranks


class DecoderLayers(Protocol):
    """The decoder layers of a model, wherever their weights are."""

    def cut(self, plan: Plan, sites: Iterable[Site]) -> None:
        """`cut_linears`, in place."""


@dataclass(frozen=True)
class UnshardedLayers:
    """All weights on this rank."""

    model: Any
    weight_owner: Any = None  # who goes on holding the dense weights, where they are another's, too

    def cut(self, plan: Plan, sites: Iterable[Site]) -> None:
        """See `Layers`."""
        if self.weight_owner is None:
            cut_linears(self.model, plan, sites=sites)
        else:
            cut_sharing_weights(self.model, self.weight_owner, plan, sites=sites)


def shard_layers(model: Any, ranks: Ranks, weight_owner: Any = None) -> DecoderLayers:
    """Shard the frozen weights where the launch says so, in place.

    Only rank 0 needs them before: on the others the model may be on the meta device. What is sharded has no `lender`.
    """
    if not ranks.uses_fsdp:
        return UnshardedLayers(model, weight_owner)
    return ShardedLayers(model, ranks)


class ShardedLayers:
    """Each rank holds a part of every layer, and sees one layer whole at a time: in a pass, and at the cut.

    FSDP2 cannot be taken off a module, so the cut fills a new decoder, layer by layer, from the old one.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.model, self.ranks = model, ranks
        self.mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        self.prefix: str = model.base_model_prefix
        self.blueprint = _meta_copy(model, self._decoder())
        self.names = architecture_info(model).layer_prefixes
        for name in self.names:
            layer = model.get_submodule(name)
            _broadcast_weights(layer.modules(), ranks)
            self._shard(layer)
        layers = tuple(f"{name}." for name in self.names)
        _broadcast_weights(
            [module for name, module in model.named_modules() if not f"{name}.".startswith(layers)], ranks
        )
        self._complete()

    def cut(self, plan: Plan, sites: Iterable[Site]) -> None:
        """See `Layers`; every rank has the weights of one layer at a time."""
        listed, old, new = tuple(sites), self._decoder(), self.blueprint.train(self.model.training)
        self.blueprint = _meta_copy(self.model, new)
        setattr(self.model, self.prefix, new)
        for index, name in enumerate(self.names):
            within = name.removeprefix(f"{self.prefix}.")
            _copy_weights(new.get_submodule(within), old.get_submodule(within))
            place, _, child = within.rpartition(".")
            setattr(old.get_submodule(place), child, nn.Identity())
            cut_linears(self.model, plan, sites=[site for site in listed if site.layer == index])
            self._shard(self.model.get_submodule(name))
        _copy_weights(new, old)
        self._complete()

    def _decoder(self) -> nn.Module:
        decoder: nn.Module = self.model.get_submodule(self.prefix)
        return decoder

    def _complete(self) -> None:
        from torch.distributed import fsdp

        shards = [self.model.get_submodule(name) for name in self.names]
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if head is None or embedding.weight is not head.weight:
            self._shard(embedding)
            shards.append(embedding)
        if hasattr(fsdp, "share_comm_ctx"):  # newer torch: one set of streams, and of memory
            fsdp.share_comm_ctx(shards)

    def _shard(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        adapters = {parameter for name, parameter in module.named_parameters() if ".lora_" in name}
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=adapters)


@torch.no_grad()
def _broadcast_weights(modules: Iterable[nn.Module], ranks: Ranks) -> None:
    """Rank 0's weights and buffers to all ranks and onto their devices, in place; tied ones stay tied."""
    slots = [(kept, name) for module in modules for kept in _stores(module) for name in kept if kept[name] is not None]
    dtypes = ranks.broadcast_from_main([kept[name].dtype for kept, name in slots])
    placed: dict[int, Tensor] = {}
    for (kept, name), dtype in zip(slots, dtypes, strict=True):
        before = kept[name]
        if id(before) not in placed:
            here = before.detach().to(ranks.device).contiguous() if ranks.is_main else None
            after = torch.empty(before.shape, dtype=dtype, device=ranks.device) if here is None else here
            dist.broadcast(after, 0)
            placed[id(before)] = _like(before, after)
        kept[name] = placed[id(before)]


def _meta_copy(model: Any, module: nn.Module) -> nn.Module:
    """The same module without its weights, sharing the model's configuration."""
    memo: dict[int, Any] = {id(config): config for config in (model.config, model.config.get_text_config())}
    for part in module.modules():
        for kept in _stores(part):
            memo |= {id(one): _like(one, one.detach().to("meta")) for one in kept.values() if one is not None}
    return copy.deepcopy(module, memo)


def _copy_weights(new: nn.Module, old: nn.Module) -> None:
    """Give a module the weights and buffers of another, by name; gathers what is sharded, and frees the old shards."""
    from torch.distributed.tensor import DTensor

    for name, module in old.named_modules():
        for kept, wanted in zip(_stores(module), _stores(new.get_submodule(name)), strict=True):
            for key, one in kept.items():
                wanted[key] = one
                if isinstance(one, DTensor):
                    wanted[key] = _like(one, one.full_tensor().detach())
                    one.to_local().untyped_storage().resize_(0)  # module and hooks hold each other, and this


def _like(before: Tensor, after: Tensor) -> Tensor:
    """A weight where `before` is one, with a gradient where it has one."""
    return nn.Parameter(after, before.requires_grad) if isinstance(before, nn.Parameter) else after


def _stores(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module keeps its own weights and buffers."""
    return module._parameters, module._buffers
