"""Passes and checkpoints of several ranks: losses and gradients summed, checkpoints written by the first rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from prunetune.data.encoding import Example
from prunetune.errors import ModelError
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
