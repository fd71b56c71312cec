"""Passes and checkpoints of several ranks as if they were one's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from prunetune.data.templates import Example
from prunetune.errors import ModelError
from prunetune.train.adapters import adapters
from prunetune.train.checkpoints import Keeper, State
from prunetune.train.parallel.ranks import Ranks
from prunetune.train.passes import Gates, Losses, Passes

T = TypeVar("T")


def together(passes: Passes, model: Any, ranks: Ranks) -> Passes:
    """Passes whose losses and gradients are those of the whole batch, on every rank."""
    return passes if ranks.world == 1 else Together(passes, model, ranks)


class Together:
    """Each rank passes over its share; losses and gradients are summed. Gradients are zero before `tune` and `both`."""

    def __init__(self, passes: Passes, model: Any, ranks: Ranks) -> None:
        self.passes, self.model, self.ranks = passes, model, ranks

    @property
    def micro_tokens(self) -> int:
        """Most tokens of one pass of one rank."""
        return self.passes.micro_tokens

    @micro_tokens.setter
    def micro_tokens(self, tokens: int) -> None:
        self.passes.micro_tokens = tokens

    @property
    def recompute(self) -> bool:
        """Whether layers are computed again for the backward pass."""
        return self.passes.recompute

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        self.passes.recompute = wanted

    def tune(self, examples: Sequence[Example], gates: Gates | None) -> Losses:
        """See `Passes`."""
        losses = self._at_once(lambda: self.passes.tune(examples, gates), gates)
        return self._summed(losses, self._gradients)

    def shrink(self, gates: Gates, weight: float) -> float:
        """See `Passes`; of no example, so that every rank has the whole of it."""
        return self._at_once(lambda: self.passes.shrink(gates, weight), None)

    def slopes(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        losses, slopes = self._at_once(lambda: self.passes.slopes(examples, gates), gates)
        return self._summed(losses, slopes.values), slopes

    def both(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        losses, slopes = self._at_once(lambda: self.passes.both(examples, gates), gates)
        return self._summed(losses, lambda: [*slopes.values(), *self._gradients()]), slopes

    def score(self, examples: Sequence[Example], gates: Gates | None) -> float:
        """See `Passes`."""
        loss = self._at_once(lambda: self.passes.score(examples, gates), gates)
        return self._summed({"loss": loss}, list)["loss"]

    def forget(self) -> None:
        """See `Passes`."""
        self.passes.forget()

    def _at_once(self, work: Callable[[], T], gates: Gates | None) -> T:
        """`work()`; where one rank's memory runs out, so it does on all, and all take smaller passes."""
        result: T | None = None
        failed: torch.OutOfMemoryError | None = None
        try:
            with _exchanging() if self.ranks.shards else nullcontext():
                result = work()
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)  # which held the tensors of the pass
        seen = () if gates is None else [gates[name] for name in sorted(gates)]
        if self.ranks.any(failed is not None, "gates", seen):
            raise failed or torch.OutOfMemoryError("out of memory on another rank")
        return result  # type: ignore[return-value]

    def _summed(self, losses: Losses, gradients: Callable[[], Iterable[Tensor]]) -> Losses:
        with _exchanging():
            values = torch.tensor(list(losses.values()), dtype=torch.float32, device=self.ranks.device)
            self.ranks.sum_([values, *gradients()])
        return dict(zip(losses, values.tolist(), strict=True))

    def _gradients(self) -> list[Tensor]:
        """Of all that is tuned, zero where this rank had no example."""
        found = []
        for parameter in adapters(self.model).values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found


@contextmanager
def _exchanging() -> Iterator[None]:
    """Memory that runs out in the block ends the run: others wait in an exchange, and a second try is no part of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            "out of GPU memory while ranks exchange weights or gradients, where passes cannot be made smaller: "
            "lower train.micro_tokens or set train.checkpointing on, then go on with --resume"
        ) from error


@dataclass(frozen=True)
class Shared:
    """A keeper that all ranks read and the first one writes; the folder has to be within reach of all."""

    keeper: Keeper
    ranks: Ranks

    def save(self, state: State) -> None:
        """Keep a state, which is the same on all ranks; raises `ModelError` where it is not."""
        self.ranks.any(False, "adapters", _in_order(state.tensors.get("adapters", {})))
        if self.ranks.is_main:
            self.keeper.save(state)

    def latest(self) -> State | None:
        """The newest state kept."""
        self.ranks.wait()
        return self.keeper.latest()


def shared(keeper: Keeper, ranks: Ranks) -> Keeper:
    """The keeper of one rank as that of all."""
    return keeper if ranks.world == 1 else Shared(keeper, ranks)


def _in_order(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensors[name] for name in sorted(tensors)]
