"""Several ranks: losses and gradients summed, checkpoints written by the first, frozen weights sharded by FSDP2."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from prunetune.data.encoding import Example
from prunetune.errors import ModelError
from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears
from prunetune.pruning.families import architecture_info
from prunetune.pruning.linears import replace_module
from prunetune.pruning.teacher_student_weights import cut_sharing_weights
from prunetune.pruning.units import Site
from prunetune.train.adapters import trainable_parameters
from prunetune.train.checkpoints import CheckpointStore, TrainingState
from prunetune.train.parallel.ranks import Ranks
from prunetune.train.passes import GateTensors, Losses, Passes

T = TypeVar("T")


def distribute_passes(passes: Passes, model: Any, ranks: Ranks) -> Passes:
    """Passes whose losses and gradients are of the whole batch, on every rank."""
    return passes if ranks.world_size == 1 else DistributedPasses(passes, model, ranks)


class DistributedPasses:
    """Each rank passes over its share of a batch; losses and gradients, zeroed before `tune`, are summed."""

    def __init__(self, passes: Passes, model: Any, ranks: Ranks) -> None:
        self.passes, self.model, self.ranks, self.size = passes, model, ranks, passes.size

    def tune(self, examples: Sequence[Example], gates: GateTensors | None) -> Losses:
        losses = self._run_on_all_ranks(lambda: self.passes.tune(examples, gates), gates)
        return self._sum_over_ranks(losses, self._gradients)

    def gate_gradients(self, examples: Sequence[Example], gates: GateTensors) -> tuple[Losses, GateTensors]:
        losses, gradients = self._run_on_all_ranks(lambda: self.passes.gate_gradients(examples, gates), gates)
        return self._sum_over_ranks(losses, gradients.values), gradients

    def score(self, examples: Sequence[Example], gates: GateTensors | None) -> float:
        loss = self._run_on_all_ranks(lambda: self.passes.score(examples, gates), gates)
        return self._sum_over_ranks({"loss": loss}, list)["loss"]

    def use_sites(self, sites: Sequence[Site], steps: int) -> None:
        self.passes.use_sites(sites, steps)

    def reset_recordings(self) -> None:
        self.passes.reset_recordings()

    def _run_on_all_ranks(self, work: Callable[[], T], gates: GateTensors | None) -> T:
        """`work()`; if one rank runs out of memory, all ranks raise torch's error, so that all take smaller passes."""
        result: T | None = None
        failed: torch.OutOfMemoryError | None = None
        try:
            with _fatal_out_of_memory() if self.ranks.uses_fsdp else nullcontext():
                result = work()
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)  # which held the tensors of the pass
        gate_values = () if gates is None else [gates[name] for name in sorted(gates)]
        if self.ranks.any_rank(failed is not None, "gates", gate_values):
            raise failed or torch.OutOfMemoryError("out of memory on another rank")
        return result  # type: ignore[return-value]

    def _sum_over_ranks(self, losses: Losses, gradients: Callable[[], Iterable[Tensor]]) -> Losses:
        with _fatal_out_of_memory():
            values = torch.tensor(list(losses.values()), dtype=torch.float32, device=self.ranks.device)
            self.ranks.all_reduce_sum_([values, *gradients()])
        return dict(zip(losses, values.tolist(), strict=True))

    def _gradients(self) -> list[Tensor]:
        """Of all weights that are tuned; zero if this rank had no example."""
        gradients = []
        for parameter in trainable_parameters(self.model).values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients


@contextmanager
def _fatal_out_of_memory() -> Iterator[None]:
    """Raises `ModelError` if memory runs out in the block: other ranks wait in an exchange, so a retry would hang."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            "out of GPU memory while ranks exchange weights or gradients, where passes cannot be made smaller: "
            "lower train.micro_tokens or set train.checkpointing on, then continue with --resume"
        ) from error


@dataclass(frozen=True)
class DistributedCheckpointStore:
    """Checkpoints that all ranks read and the first one writes; the folder must be visible to all."""

    store: CheckpointStore
    ranks: Ranks

    def save(self, state: TrainingState) -> None:
        """Save a state; raises `ModelError` if the adapters differ between ranks."""
        adapters = state.tensors.get("adapters", {})
        self.ranks.any_rank(False, "adapters", [weight for _, weight in sorted(adapters.items())])
        if self.ranks.is_main:
            self.store.save(state)

    def latest(self) -> TrainingState | None:
        """The newest state saved, if any."""
        self.ranks.barrier()
        return self.store.latest()


def distribute_checkpoints(store: CheckpointStore, ranks: Ranks) -> CheckpointStore:
    """The store of one rank as that of all ranks."""
    return store if ranks.world_size == 1 else DistributedCheckpointStore(store, ranks)


# -- sharded weights ---------------------------------------------------------------------------------------------------

# Frozen weights are sharded over ranks by FSDP2 (Zhao et al. 2023, arXiv 2304.11277): each decoder layer, and the
# embedding if it is not tied to the head. Every rank has all adapters, norms between layers and the head: optimiser and
# cut work on adapters, and the head runs outside the model's forward.

# `cut_linears` of a model, sharded or not: the plan, the sites, and the plan that earlier cuts have left, if any.
CutLayers = Callable[[Plan, Sequence[Site], Plan | None], None]


def shard_layers(model: Any, ranks: Ranks, weight_owner: Any = None) -> CutLayers:
    """Shard the frozen weights if the launch says so, in place; returns how the model is cut from here on.

    Only rank 0 needs the weights before: on the others the model may be on the meta device. Weights that are not
    sharded may belong to a `weight_owner`: a model that shares the dense weights and keeps them, the teacher.
    """
    if ranks.uses_fsdp:
        return ShardedLayers(model, ranks).cut
    if weight_owner is None:
        return lambda plan, sites, _: cut_linears(model, plan, sites=sites)
    return lambda plan, sites, before: cut_sharing_weights(model, weight_owner, plan, sites=sites, before=before)


class ShardedLayers:
    """Each rank holds a shard of every layer, and gathers one layer at a time: in a pass, and at the cut.

    FSDP2 cannot be removed from a module, so the cut fills a new decoder, layer by layer, from the old one.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.model, self.ranks = model, ranks
        self.mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        self.names = architecture_info(model).layer_prefixes
        self.prefix = self.names[0].partition(".")[0]  # of the decoder
        self.blueprint = _meta_copy(model, model.get_submodule(self.prefix))
        for name in self.names:
            layer = model.get_submodule(name)
            _broadcast_weights(layer.modules(), ranks)
            self._shard(layer)
        layers = tuple(f"{name}." for name in self.names)
        _broadcast_weights(
            [module for name, module in model.named_modules() if not f"{name}.".startswith(layers)], ranks
        )
        self._shard_embedding()

    def cut(self, plan: Plan, sites: Sequence[Site], before: Plan | None) -> None:
        """`cut_linears`; every rank gathers the weights of one layer at a time."""
        old, new = self.model.get_submodule(self.prefix), self.blueprint.train(self.model.training)
        self.blueprint = _meta_copy(self.model, new)
        setattr(self.model, self.prefix, new)
        for index, name in enumerate(self.names):
            within = name.removeprefix(f"{self.prefix}.")
            _copy_weights(new.get_submodule(within), old.get_submodule(within))
            parent, _, child = within.rpartition(".")
            setattr(old.get_submodule(parent), child, nn.Identity())
            cut_linears(self.model, plan, sites=[site for site in sites if site.layer == index])
            layer = self.model.get_submodule(name)
            replace_module(self.blueprint, within, _meta_copy(self.model, layer))  # for the next cut
            self._shard(layer)
        _copy_weights(new, old)
        self._shard_embedding()

    def _shard_embedding(self) -> None:
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
    """Send rank 0's weights and buffers to all ranks and onto their devices, in place; tied ones stay tied."""
    slots = [
        (store, name) for module in modules for store in _stores(module) for name in store if store[name] is not None
    ]
    dtypes = ranks.broadcast_from_main([store[name].dtype for store, name in slots])
    sent: dict[int, Tensor] = {}
    for (store, name), dtype in zip(slots, dtypes, strict=True):
        before = store[name]
        if id(before) not in sent:
            if ranks.is_main:
                after = before.detach().to(ranks.device).contiguous()
            else:
                after = torch.empty(before.shape, dtype=dtype, device=ranks.device)
            dist.broadcast(after, 0)
            sent[id(before)] = _like(before, after)
        store[name] = sent[id(before)]


def _meta_copy(model: Any, module: nn.Module) -> nn.Module:
    """The same module without its weights, sharing the model's configuration."""
    memo: dict[int, Any] = {id(config): config for config in (model.config, model.config.get_text_config())}
    for store in (store for submodule in module.modules() for store in _stores(submodule)):
        memo |= {id(value): _like(value, value.detach().to("meta")) for value in store.values() if value is not None}
    return copy.deepcopy(module, memo)


def _copy_weights(new: nn.Module, old: nn.Module) -> None:
    """Give a module the weights and buffers of another, by name; gathers sharded ones and frees the old shards."""
    from torch.distributed.tensor import DTensor

    for name, module in old.named_modules():
        for source, target in zip(_stores(module), _stores(new.get_submodule(name)), strict=True):
            for key, value in source.items():
                target[key] = value
                if isinstance(value, DTensor):
                    target[key] = _like(value, value.full_tensor().detach())
                    value.to_local().untyped_storage().resize_(0)  # a cycle of module and hooks keeps it alive


def _like(before: Tensor, after: Tensor) -> Tensor:
    """`after` as a parameter if `before` is one, requiring a gradient if that does."""
    return nn.Parameter(after, before.requires_grad) if isinstance(before, nn.Parameter) else after


def _stores(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dicts of a module's own weights and buffers."""
    return module._parameters, module._buffers
