"""Forward and backward passes of the two players: padded batches anywhere, packed and recorded ones on a GPU.

Both give the same losses and gradients; see `tests/test_train_passes.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from prunetune.config import RunConfig
from prunetune.data.packs import Pack, pack, packable
from prunetune.data.templates import Example
from prunetune.model.masking import Adapters, masked
from prunetune.model.packed import can_pack, packed_rows
from prunetune.model.recompute import recomputed, recomputes
from prunetune.model.sites import Site
from prunetune.train.adapters import adapters, frozen
from prunetune.train.graphs import Function, Recorder
from prunetune.train.objectives import Teacher, answer_loss, backward, feed_of_pack, group_lasso, losses, mean_loss

log = logging.getLogger(__name__)

Gates = Mapping[str, Tensor]
Losses = Mapping[str, float]  # "loss", and "distance" where there is a teacher


class Passes(Protocol):
    """What the players ask of the model.

    "loss" is a mean over answer tokens in nats, "distance" a mean over all tokens; gradients are of their sum.
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
    model: Any, sites: Sequence[Site], pad_id: int, config: RunConfig, teacher: Teacher | None = None
) -> Passes:
    """Packed passes where the GPU and the model can take them, else padded ones."""
    device = next(model.parameters()).device
    worth = device.type == "cuda" and model.dtype != torch.float32 and not config.lora.dropout
    worth = worth and config.lora.quantize == "off"  # a large model's steps do not wait for launches
    if worth and config.train.packing == "auto":
        if can_pack(model):
            return Packed(model, sites, pad_id, config, teacher)
        log.info("%s cannot be packed: examples are padded, which is slower", model.config.model_type)
    return Padded(model, sites, pad_id, config, teacher)


class Padded:
    """Examples side by side, run as they come."""

    def __init__(
        self, model: Any, sites: Sequence[Site], pad_id: int, config: RunConfig, teacher: Teacher | None = None
    ) -> None:
        self.model, self.sites, self.pad_id, self.teacher = model, sites, pad_id, teacher
        self.micro_tokens = config.train.micro_tokens
        self.recompute = recomputes(config)
        self.form: Adapters = "free" if config.search.lora_aware else "gated"

    def tune(self, examples: Sequence[Example], gates: Gates | None) -> Losses:
        """See `Passes`."""
        self.model.train()
        try:
            with self._gated(gates, self.form):
                return self._backward(examples)
        finally:
            self.model.eval()

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
            return mean_loss(self.model, examples, self.pad_id, self.micro_tokens)

    def forget(self) -> None:
        """See `Passes`."""

    def _backward(self, examples: Sequence[Example]) -> Losses:
        with recomputed(self.model) if self.recompute else nullcontext():
            loss, distance = backward(self.model, examples, self.pad_id, self.micro_tokens, self.teacher)
        return {"loss": loss, "distance": distance} if self.teacher else {"loss": loss}

    def _gated(self, gates: Gates | None, kind: Adapters) -> Any:
        if gates is None:
            return nullcontext()
        return masked(self.model, gates, adapters=kind, sites=self.sites)


class Packed:
    """Examples end to end in one row (no padding), each shape of row recorded as one CUDA graph.

    Recorded kernels know addresses, not names: gates, gradients and sums stay in the same tensors throughout. Whoever
    clears the adapters' gradients zeroes them in place; one that is set to None is lost to the recordings.
    """

    def __init__(
        self, model: Any, sites: Sequence[Site], pad_id: int, config: RunConfig, teacher: Teacher | None = None
    ) -> None:
        self.model, self.sites, self.pad_id, self.teacher = model, sites, pad_id, teacher
        self.micro_tokens = config.train.micro_tokens
        self.recompute = recomputes(config)
        self.form: Adapters = "free" if config.search.lora_aware else "gated"
        self.device = next(model.parameters()).device
        self.recorder = Recorder(self.device)
        self.sums = torch.zeros(2, device=self.device)  # answer loss and distance, or the lasso
        self.gates = torch.zeros(sum(site.units for site in sites), device=self.device, requires_grad=True)
        self.gates.grad = torch.zeros_like(self.gates)

    def tune(self, examples: Sequence[Example], gates: Gates | None) -> Losses:
        """See `Passes`."""
        results = self._gradients()
        if gates is None:
            return self._over(examples, "tune", self._learn, results)
        self._set(gates)
        return self._over(examples, "tune gated", self._learn_gated, results)

    def shrink(self, gates: Gates, weight: float) -> float:
        """See `Passes`."""
        self._set(gates)
        self.sums.zero_()
        self.recorder.run("shrink", self._shrink, [torch.tensor(weight)], [self.sums, *self._gradients()])
        return float(self.sums[0])

    def slopes(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        assert self.gates.grad is not None
        self._set(gates)
        self.gates.grad.zero_()
        result = self._over(examples, "slopes", self._slopes, [self.gates.grad])
        return result, self._by_site(self.gates.grad.clone())

    def both(self, examples: Sequence[Example], gates: Gates) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        assert self.gates.grad is not None
        self._set(gates)
        self.gates.grad.zero_()
        result = self._over(examples, "both", self._both, [self.gates.grad, *self._gradients()])
        return result, self._by_site(self.gates.grad.clone())

    def score(self, examples: Sequence[Example], gates: Gates | None) -> float:
        """See `Passes`."""
        if gates is None:
            return self._over(examples, "score", self._score, [])["loss"]
        self._set(gates)
        return self._over(examples, "score gated", self._score_gated, [])["loss"]

    def forget(self) -> None:
        """See `Passes`."""
        self.recorder.forget()

    def _over(self, examples: Sequence[Example], kind: str, function: Function, results: list[Tensor]) -> Losses:
        """Run `function` on packs of all examples; mean losses."""
        parts = packable(examples, self.micro_tokens)
        packs = [pack(part, self.pad_id, sequences=len(examples)) for part in parts]
        labels, tokens = sum(one.tokens for one in packs), sum(len(example.ids) for example in examples)
        shares = torch.tensor([1 / max(1, labels), 1 / max(1, tokens)])
        self.sums.zero_()
        for one in packs:
            self.recorder.run((kind, *one.shape), function, [*one.tensors(), shares], [self.sums, *results])
        loss, distance = self.sums.tolist()
        return {"loss": loss, "distance": distance} if self.teacher else {"loss": loss}

    def _learn(self, inputs: Sequence[Tensor]) -> None:
        feed, shares = feed_of_pack(Pack(*inputs[:-1])), inputs[-1]
        again = recomputed(self.model) if self.recompute else nullcontext()
        with packed_rows(self.model), packed_rows(self.teacher.model) if self.teacher else nullcontext(), again:
            parts = torch.stack(losses(self.model, feed, self.teacher)) * shares
            parts.sum().backward()  # type: ignore[no-untyped-call]
        self.sums += parts.detach()

    def _learn_gated(self, inputs: Sequence[Tensor]) -> None:
        with masked(self.model, self._by_site(self.gates.detach()), adapters=self.form, sites=self.sites):
            self._learn(inputs)

    def _both(self, inputs: Sequence[Tensor]) -> None:
        with masked(self.model, self._by_site(self.gates), adapters=self.form, sites=self.sites):
            self._learn(inputs)

    def _shrink(self, inputs: Sequence[Tensor]) -> None:
        penalty = group_lasso(self.model, self._by_site(self.gates.detach()), self.sites)
        (penalty * inputs[0]).backward()  # type: ignore[no-untyped-call]
        self.sums[0] += penalty.detach()

    def _slopes(self, inputs: Sequence[Tensor]) -> None:
        with frozen(self.model), masked(self.model, self._by_site(self.gates), sites=self.sites):
            self._learn(inputs)

    @torch.no_grad()
    def _score(self, inputs: Sequence[Tensor]) -> None:
        with packed_rows(self.model):
            self.sums[0] += answer_loss(self.model, feed_of_pack(Pack(*inputs[:-1]))) * inputs[-1][0]

    def _score_gated(self, inputs: Sequence[Tensor]) -> None:
        with masked(self.model, self._by_site(self.gates.detach()), sites=self.sites):
            self._score(inputs)

    def _set(self, gates: Gates) -> None:
        self.gates.detach().copy_(torch.cat([gates[site.name].detach() for site in self.sites]))

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [site.units for site in self.sites])
        return {site.name: part for site, part in zip(self.sites, parts, strict=True)}

    def _gradients(self) -> list[Tensor]:
        """The adapters' gradients, made where there are none yet."""
        gradients = []
        for parameter in adapters(self.model).values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        return gradients


def _leaves(gates: Gates) -> dict[str, Tensor]:
    return {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}


def _gradients_at(leaves: Gates) -> dict[str, Tensor]:
    return {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
