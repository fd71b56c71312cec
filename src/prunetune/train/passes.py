"""Forward and backward passes of the two players: padded batches anywhere, packed and recorded ones on a GPU.

Both give the same losses and gradients; see `tests/test_train_passes.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import InitVar, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunetune.config.recipe import RunConfig, TrainConfig
from prunetune.data.packs import Pack, pack, packable
from prunetune.data.templates import Example
from prunetune.model.activation_checkpointing import recomputed, recomputes
from prunetune.model.compiled_kernels import fused
from prunetune.model.sequence_packing import can_pack, packed_rows
from prunetune.pruning.masking import Adapters, masked
from prunetune.pruning.sites import Site
from prunetune.train.adapters import adapters, dropping, frozen
from prunetune.train.cuda_graphs import Recorder
from prunetune.train.losses import (
    PLAIN,
    Teacher,
    answer_loss,
    backward,
    compiled_terms,
    feed_of_pack,
    group_lasso,
    labels_of,
    lessons,
    losses,
    mean_loss,
    tokens_of,
)
from prunetune.train.parallel.ranks import ALONE, Ranks

log = logging.getLogger(__name__)

LONG = 1000  # steps from which compiling pays
Gates = Mapping[str, Tensor]
Losses = Mapping[str, float]  # "loss", and "distance" where there is a teacher
# Over a row, with its teacher; the second holds the share of one label, and of one token that a teacher sees.
Pass = Callable[[Pack, Tensor, Teacher | None], None]


class Passes(Protocol):
    """What the players ask of the model.

    "loss" is a mean over answer tokens in nats, "distance" over the teacher's tokens; gradients are of their sum.
    """

    micro_tokens: int  # most tokens of one pass
    recompute: bool  # layers are computed again for the backward pass, see `model.recompute`

    def tune(self, examples: Sequence[Example], gates: Gates | None) -> Losses:
        """Losses of the LoRA-aware forward (or of the model as it is); adapters accumulate their gradient.

        Without `search.lora_aware`, those of the gated model.
        """

    def shrink(self, gates: Gates, weight: float) -> float:
        """Group lasso under these gates; adapters accumulate `weight` times its gradient."""

    def slopes(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """Losses of the gated model with frozen adapters, and their gradient at each gate: {site: [U]}."""

    def both(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """`tune`, and the gradient at each gate from the same backward pass: {site: [U]}."""

    def score(self, examples: Sequence[Example], gates: Gates | None) -> float:
        """Loss of the gated model (or of the model as it is), no gradient."""

    def forget(self) -> None:
        """The model has changed its shape."""


def passes_for(
    model: Any,
    sites: Sequence[Site],
    pad_id: int,
    config: RunConfig,
    teacher: Teacher | None = None,
    ranks: Ranks = ALONE,
) -> Passes:
    """Packed passes where the GPU and the model can take them, else padded ones; over this rank's share of examples."""
    device = next(model.parameters()).device
    worth = device.type == "cuda" and model.dtype != torch.float32 and not config.lora.dropout
    worth = worth and not ranks.shards  # a recording cannot hold the exchange of weights
    worth = worth and config.lora.quantize == "off"  # a large model's steps do not wait for launches
    if worth and config.train.packing == "auto":
        if can_pack(model):
            return Packed(model, sites, pad_id, config, teacher, ranks)
        log.warning("%s cannot be packed: examples are padded, which is several times slower", model.config.model_type)
    return Padded(model, sites, pad_id, config, teacher, ranks)


def worth_compiling(train: TrainConfig) -> bool:
    """Compiling takes half a minute or more, which short runs would not get back."""
    return train.compile == "on" or (train.compile == "auto" and train.steps >= LONG)


@dataclass(eq=False)
class _Given:
    """What both kinds of passes are given, and what the recipe says of it."""

    model: Any
    sites: Sequence[Site]
    pad_id: int
    config: InitVar[RunConfig]
    teacher: Teacher | None = None
    ranks: Ranks = ALONE

    def __post_init__(self, config: RunConfig) -> None:
        self.micro_tokens = config.train.micro_tokens
        self.recompute = recomputes(config)
        self.form: Adapters = "free" if config.search.lora_aware else "gated"


class Padded(_Given):
    """Examples side by side, run as they come."""

    def tune(self, examples: Sequence[Example], gates: Gates | None) -> Losses:
        """See `Passes`."""
        with dropping(self.model), self._gated(gates, self.form):
            return self._backward(examples)

    def shrink(self, gates: Gates, weight: float) -> float:
        """See `Passes`."""
        penalty = group_lasso(self.model, gates, self.sites)
        (weight * penalty).backward()  # type: ignore[no-untyped-call]
        return float(penalty.detach())

    def slopes(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        leaves = _leaves(gates)
        with frozen(self.model), masked(self.model, leaves, sites=self.sites):
            result = self._backward(examples)
        return result, _gradients_at(leaves)

    def both(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        leaves = _leaves(gates)
        return self.tune(examples, leaves), _gradients_at(leaves)

    def score(self, examples: Sequence[Example], gates: Gates | None) -> float:
        """See `Passes`."""
        with self._gated(gates, "gated"):
            return mean_loss(self.model, examples, self.pad_id, self.micro_tokens, self.ranks)

    def forget(self) -> None:
        """See `Passes`."""

    def _backward(self, examples: Sequence[Example]) -> Losses:
        with recomputed(self.model) if self.recompute else nullcontext():
            loss, distance = backward(self.model, examples, self.pad_id, self.micro_tokens, self.teacher, self.ranks)
        return {"loss": loss, "distance": distance} if self.teacher else {"loss": loss}

    def _gated(self, gates: Gates | None, kind: Adapters) -> Any:
        if gates is None:
            return nullcontext()
        return masked(self.model, gates, adapters=kind, sites=self.sites)


class Packed(_Given):
    """Examples end to end in one row (no padding), each shape of row recorded as one CUDA graph.

    Recorded kernels know addresses, not names: gates, gradients and sums stay in the same tensors throughout. Whoever
    clears the adapters' gradients zeroes them in place; one that is set to None is lost to the recordings.
    """

    def __post_init__(self, config: RunConfig) -> None:
        super().__post_init__(config)
        self.device = next(self.model.parameters()).device
        self.recorder = Recorder(self.device)
        self.compiles = worth_compiling(config.train)
        self.tuned: list[nn.Parameter] = []  # looked up once for all passes: a walk over a large model takes long
        self.sums = torch.zeros(2, device=self.device)  # answer loss and distance, or the lasso
        self.gates = torch.zeros(sum(site.units for site in self.sites), device=self.device, requires_grad=True)
        self.gates.grad = torch.zeros_like(self.gates)

    def tune(self, examples: Sequence[Example], gates: Gates | None) -> Losses:
        """See `Passes`."""
        self._make_gradients()
        if gates is None:
            return self._over(examples, "tune", self._learn, self.teacher)
        self._set(gates)
        return self._over(examples, "tune gated", self._learn_gated, self.teacher)

    def shrink(self, gates: Gates, weight: float) -> float:
        """See `Passes`."""
        self._set(gates)
        self.sums.zero_()
        self._make_gradients()
        self.recorder.run("shrink", self._shrink, [torch.tensor(weight)])
        return float(self.sums[0])

    def slopes(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        assert self.gates.grad is not None
        self._set(gates)
        self.gates.grad.zero_()
        result = self._over(examples, "slopes", self._slopes, self.teacher)
        return result, self._by_site(self.gates.grad.clone())

    def both(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        assert self.gates.grad is not None
        self._set(gates)
        self.gates.grad.zero_()
        self._make_gradients()
        result = self._over(examples, "both", self._both, self.teacher)
        return result, self._by_site(self.gates.grad.clone())

    def score(self, examples: Sequence[Example], gates: Gates | None) -> float:
        """See `Passes`."""
        if gates is None:
            return self._over(examples, "score", self._score)["loss"]
        self._set(gates)
        return self._over(examples, "score gated", self._score_gated)["loss"]

    def forget(self) -> None:
        """See `Passes`."""
        self.recorder.forget()
        self.tuned = []

    def _over(self, examples: Sequence[Example], kind: str, function: Pass, teacher: Teacher | None = None) -> Losses:
        """Run `function` on packs of all examples; mean losses."""
        self.sums.zero_()
        for who, part in lessons(examples, teacher):
            shares = torch.tensor([1 / labels_of(examples), 1 / tokens_of(part)])
            for some in packable(self.ranks.share(part), self.micro_tokens):
                one = pack(some, self.pad_id, sequences=len(examples))

                def run(inputs: Sequence[Tensor], one: Pack = one, who: Teacher | None = who) -> None:
                    function(one.holding(inputs[:-1]), inputs[-1], who)

                self.recorder.run((kind, who is None, *one.shape), run, [*one.tensors(), shares])
        loss, distance = self.sums.tolist()
        return {"loss": loss, "distance": distance} if teacher else {"loss": loss}

    def _learn(self, row: Pack, shares: Tensor, teacher: Teacher | None) -> None:
        terms = compiled_terms() if self.compiles else PLAIN
        with self._packed(), recomputed(self.model) if self.recompute else nullcontext():
            parts = torch.stack(losses(self.model, feed_of_pack(row), teacher, terms)) * shares
            parts.sum().backward()  # type: ignore[no-untyped-call]
        self.sums += parts.detach()

    @contextmanager
    def _packed(self) -> Iterator[None]:
        models = [self.model, *([self.teacher.model] if self.teacher else [])]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(packed_rows(model))
            if self.compiles:
                stack.enter_context(fused(*models))
            yield

    def _learn_gated(self, row: Pack, shares: Tensor, teacher: Teacher | None) -> None:
        with masked(self.model, self._by_site(self.gates.detach()), adapters=self.form, sites=self.sites):
            self._learn(row, shares, teacher)

    def _both(self, row: Pack, shares: Tensor, teacher: Teacher | None) -> None:
        with masked(self.model, self._by_site(self.gates), adapters=self.form, sites=self.sites):
            self._learn(row, shares, teacher)

    def _shrink(self, inputs: Sequence[Tensor]) -> None:
        penalty = group_lasso(self.model, self._by_site(self.gates.detach()), self.sites)
        (penalty * inputs[0]).backward()  # type: ignore[no-untyped-call]
        self.sums[0] += penalty.detach()

    def _slopes(self, row: Pack, shares: Tensor, teacher: Teacher | None) -> None:
        with frozen(self.model), masked(self.model, self._by_site(self.gates), sites=self.sites):
            self._learn(row, shares, teacher)

    @torch.no_grad()
    def _score(self, row: Pack, shares: Tensor, _: Teacher | None = None) -> None:
        with self._packed():
            self.sums[0] += answer_loss(self.model, feed_of_pack(row)) * shares[0]

    def _score_gated(self, row: Pack, shares: Tensor, _: Teacher | None = None) -> None:
        with masked(self.model, self._by_site(self.gates.detach()), sites=self.sites):
            self._score(row, shares)

    def _set(self, gates: Gates) -> None:
        self.gates.detach().copy_(torch.cat([gates[site.name].detach() for site in self.sites]))

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [site.units for site in self.sites])
        return {site.name: part for site, part in zip(self.sites, parts, strict=True)}

    def _make_gradients(self) -> None:
        """Every adapter has a gradient before a pass is recorded, which then adds to it."""
        self.tuned = self.tuned or list(adapters(self.model).values())
        for parameter in self.tuned:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _leaves(gates: Gates) -> dict[str, Tensor]:
    return {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}


def _gradients_at(leaves: Gates) -> dict[str, Tensor]:
    return {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
