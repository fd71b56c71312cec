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
from prunetune.data.encoding import Example
from prunetune.data.packing import PackedBatch, group_for_packing, pack_examples
from prunetune.model.activation_checkpointing import use_checkpointing, uses_checkpointing
from prunetune.model.compiled_kernels import use_compiled_kernels
from prunetune.model.sequence_packing import supports_packing, use_packed_attention
from prunetune.pruning.masking import AdapterGating, masked
from prunetune.pruning.sites import Site
from prunetune.train.adapters import frozen_adapters, lora_dropout_enabled, trainable_parameters
from prunetune.train.cuda_graphs import CudaGraphRecorder
from prunetune.train.losses import (
    EAGER_TERMS,
    Teacher,
    accumulate_gradients,
    answer_and_distill_loss,
    answer_loss,
    compiled_terms,
    count_labels,
    count_tokens,
    group_lasso,
    inputs_from_pack,
    mean_loss,
    split_by_teacher,
)
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks

log = logging.getLogger(__name__)

COMPILE_MIN_STEPS = 1000  # steps from which compiling pays
GateTensors = Mapping[str, Tensor]
Losses = Mapping[str, float]  # "loss", and "distance" where there is a teacher
# Over a row, with its teacher; the second holds the share of one label, and of one token that a teacher sees.
PackFunction = Callable[[PackedBatch, Tensor, Teacher | None], None]


class Passes(Protocol):
    """What the players ask of the model.

    "loss" is a mean over answer tokens in nats, "distance" over the teacher's tokens; gradients are of their sum.
    """

    micro_tokens: int  # most tokens of one pass
    recompute: bool  # layers are computed again for the backward pass, see `model.recompute`

    def tune(self, examples: Sequence[Example], gates: GateTensors | None) -> Losses:
        """Losses of the LoRA-aware forward (or of the model as it is); adapters accumulate their gradient.

        Without `search.lora_aware`, those of the gated model.
        """

    def group_lasso_step(self, gates: GateTensors, weight: float) -> float:
        """Group lasso under these gates; adapters accumulate `weight` times its gradient."""

    def gate_gradients(self, examples: Sequence[Example], gates: GateTensors) -> tuple[Losses, dict[str, Tensor]]:
        """Losses of the gated model with frozen adapters, and their gradient at each gate: {site: [U]}."""

    def tune_with_gate_gradients(
        self, examples: Sequence[Example], gates: GateTensors
    ) -> tuple[Losses, dict[str, Tensor]]:
        """`tune`, and the gradient at each gate from the same backward pass: {site: [U]}."""

    def score(self, examples: Sequence[Example], gates: GateTensors | None) -> float:
        """Loss of the gated model (or of the model as it is), no gradient."""

    def reset_recordings(self) -> None:
        """The model has changed its shape."""


def build_passes(
    model: Any,
    sites: Sequence[Site],
    pad_id: int,
    config: RunConfig,
    teacher: Teacher | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Passes:
    """Packed passes where the GPU and the model can take them, else padded ones; over this rank's share of examples."""
    device = next(model.parameters()).device
    worth = device.type == "cuda" and model.dtype != torch.float32 and not config.lora.dropout
    worth = worth and not ranks.uses_fsdp  # a recording cannot hold the exchange of weights
    worth = worth and config.lora.quantize == "off"  # a large model's steps do not wait for launches
    if worth and config.train.packing == "auto":
        if supports_packing(model):
            return PackedPasses(model, sites, pad_id, config, teacher, ranks)
        log.warning("%s cannot be packed: examples are padded, which is several times slower", model.config.model_type)
    return PaddedPasses(model, sites, pad_id, config, teacher, ranks)


def should_compile(train: TrainConfig) -> bool:
    """Compiling takes half a minute or more, which short runs would not get back."""
    return train.compile == "on" or (train.compile == "auto" and train.steps >= COMPILE_MIN_STEPS)


@dataclass(eq=False)
class _BasePasses:
    """What both kinds of passes are given, and what the recipe says of it."""

    model: Any
    sites: Sequence[Site]
    pad_id: int
    config: InitVar[RunConfig]
    teacher: Teacher | None = None
    ranks: Ranks = SINGLE_PROCESS

    def __post_init__(self, config: RunConfig) -> None:
        self.micro_tokens = config.train.micro_tokens
        self.recompute = uses_checkpointing(config)
        self.adapter_mode: AdapterGating = "free" if config.search.lora_aware else "gated"


class PaddedPasses(_BasePasses):
    """Examples side by side, run as they come."""

    def tune(self, examples: Sequence[Example], gates: GateTensors | None) -> Losses:
        """See `Passes`."""
        with lora_dropout_enabled(self.model), self._gated(gates, self.adapter_mode):
            return self._backward(examples)

    def group_lasso_step(self, gates: GateTensors, weight: float) -> float:
        """See `Passes`."""
        penalty = group_lasso(self.model, gates, self.sites)
        (weight * penalty).backward()  # type: ignore[no-untyped-call]
        return float(penalty.detach())

    def gate_gradients(self, examples: Sequence[Example], gates: GateTensors) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        leaves = _leaves(gates)
        with frozen_adapters(self.model), masked(self.model, leaves, sites=self.sites):
            result = self._backward(examples)
        return result, _gradients_at(leaves)

    def tune_with_gate_gradients(
        self, examples: Sequence[Example], gates: GateTensors
    ) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        leaves = _leaves(gates)
        return self.tune(examples, leaves), _gradients_at(leaves)

    def score(self, examples: Sequence[Example], gates: GateTensors | None) -> float:
        """See `Passes`."""
        with self._gated(gates, "gated"):
            return mean_loss(self.model, examples, self.pad_id, self.micro_tokens, self.ranks)

    def reset_recordings(self) -> None:
        """See `Passes`."""

    def _backward(self, examples: Sequence[Example]) -> Losses:
        with use_checkpointing(self.model) if self.recompute else nullcontext():
            loss, distance = accumulate_gradients(
                self.model, examples, self.pad_id, self.micro_tokens, self.teacher, self.ranks
            )
        return {"loss": loss, "distance": distance} if self.teacher else {"loss": loss}

    def _gated(self, gates: GateTensors | None, kind: AdapterGating) -> Any:
        if gates is None:
            return nullcontext()
        return masked(self.model, gates, adapters=kind, sites=self.sites)


class PackedPasses(_BasePasses):
    """Examples end to end in one row (no padding), each shape of row recorded as one CUDA graph.

    Recorded kernels know addresses, not names: gates, gradients and sums stay in the same tensors throughout. Whoever
    clears the adapters' gradients zeroes them in place; one that is set to None is lost to the recordings.
    """

    def __post_init__(self, config: RunConfig) -> None:
        super().__post_init__(config)
        self.device = next(self.model.parameters()).device
        self.recorder = CudaGraphRecorder(self.device)
        self.compiles = should_compile(config.train)
        self.trainable: list[nn.Parameter] = []  # looked up once for all passes: a walk over a large model takes long
        self.sums = torch.zeros(2, device=self.device)  # answer loss and distance, or the lasso
        self.gates = torch.zeros(sum(site.units for site in self.sites), device=self.device, requires_grad=True)
        self.gates.grad = torch.zeros_like(self.gates)

    def tune(self, examples: Sequence[Example], gates: GateTensors | None) -> Losses:
        """See `Passes`."""
        self._make_gradients()
        if gates is None:
            return self._run_packs(examples, "tune", self._forward_backward, self.teacher)
        self._set_gates(gates)
        return self._run_packs(examples, "tune gated", self._learn_gated, self.teacher)

    def group_lasso_step(self, gates: GateTensors, weight: float) -> float:
        """See `Passes`."""
        self._set_gates(gates)
        self.sums.zero_()
        self._make_gradients()
        self.recorder.run("shrink", self._group_lasso_pass, [torch.tensor(weight)])
        return float(self.sums[0])

    def gate_gradients(self, examples: Sequence[Example], gates: GateTensors) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        assert self.gates.grad is not None
        self._set_gates(gates)
        self.gates.grad.zero_()
        result = self._run_packs(examples, "slopes", self._gate_gradients_pass, self.teacher)
        return result, self._by_site(self.gates.grad.clone())

    def tune_with_gate_gradients(
        self, examples: Sequence[Example], gates: GateTensors
    ) -> tuple[Losses, dict[str, Tensor]]:
        """See `Passes`."""
        assert self.gates.grad is not None
        self._set_gates(gates)
        self.gates.grad.zero_()
        self._make_gradients()
        result = self._run_packs(examples, "both", self._tune_with_gate_gradients_pass, self.teacher)
        return result, self._by_site(self.gates.grad.clone())

    def score(self, examples: Sequence[Example], gates: GateTensors | None) -> float:
        """See `Passes`."""
        if gates is None:
            return self._run_packs(examples, "score", self._score)["loss"]
        self._set_gates(gates)
        return self._run_packs(examples, "score gated", self._score_gated)["loss"]

    def reset_recordings(self) -> None:
        """See `Passes`."""
        self.recorder.reset_recordings()
        self.trainable = []

    def _run_packs(
        self, examples: Sequence[Example], kind: str, function: PackFunction, teacher: Teacher | None = None
    ) -> Losses:
        """Run `function` on packs of all examples; mean losses."""
        self.sums.zero_()
        for who, part in split_by_teacher(examples, teacher):
            shares = torch.tensor([1 / count_labels(examples), 1 / count_tokens(part)])
            for some in group_for_packing(self.ranks.local_examples(part), self.micro_tokens):
                one = pack_examples(some, self.pad_id, max_sequences=len(examples))

                def run(inputs: Sequence[Tensor], one: PackedBatch = one, who: Teacher | None = who) -> None:
                    function(one.with_tensors(inputs[:-1]), inputs[-1], who)

                self.recorder.run((kind, who is None, *one.shape_key), run, [*one.tensors(), shares])
        loss, distance = self.sums.tolist()
        return {"loss": loss, "distance": distance} if teacher else {"loss": loss}

    def _forward_backward(self, row: PackedBatch, shares: Tensor, teacher: Teacher | None) -> None:
        terms = compiled_terms() if self.compiles else EAGER_TERMS
        with self._packed(), use_checkpointing(self.model) if self.recompute else nullcontext():
            parts = torch.stack(answer_and_distill_loss(self.model, inputs_from_pack(row), teacher, terms)) * shares
            parts.sum().backward()  # type: ignore[no-untyped-call]
        self.sums += parts.detach()

    @contextmanager
    def _packed(self) -> Iterator[None]:
        models = [self.model, *([self.teacher.model] if self.teacher else [])]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(use_packed_attention(model))
            if self.compiles:
                stack.enter_context(use_compiled_kernels(*models))
            yield

    def _learn_gated(self, row: PackedBatch, shares: Tensor, teacher: Teacher | None) -> None:
        with masked(self.model, self._by_site(self.gates.detach()), adapters=self.adapter_mode, sites=self.sites):
            self._forward_backward(row, shares, teacher)

    def _tune_with_gate_gradients_pass(self, row: PackedBatch, shares: Tensor, teacher: Teacher | None) -> None:
        with masked(self.model, self._by_site(self.gates), adapters=self.adapter_mode, sites=self.sites):
            self._forward_backward(row, shares, teacher)

    def _group_lasso_pass(self, inputs: Sequence[Tensor]) -> None:
        penalty = group_lasso(self.model, self._by_site(self.gates.detach()), self.sites)
        (penalty * inputs[0]).backward()  # type: ignore[no-untyped-call]
        self.sums[0] += penalty.detach()

    def _gate_gradients_pass(self, row: PackedBatch, shares: Tensor, teacher: Teacher | None) -> None:
        with frozen_adapters(self.model), masked(self.model, self._by_site(self.gates), sites=self.sites):
            self._forward_backward(row, shares, teacher)

    @torch.no_grad()
    def _score(self, row: PackedBatch, shares: Tensor, _: Teacher | None = None) -> None:
        with self._packed():
            self.sums[0] += answer_loss(self.model, inputs_from_pack(row)) * shares[0]

    def _score_gated(self, row: PackedBatch, shares: Tensor, _: Teacher | None = None) -> None:
        with masked(self.model, self._by_site(self.gates.detach()), sites=self.sites):
            self._score(row, shares)

    def _set_gates(self, gates: GateTensors) -> None:
        self.gates.detach().copy_(torch.cat([gates[site.name].detach() for site in self.sites]))

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [site.units for site in self.sites])
        return {site.name: part for site, part in zip(self.sites, parts, strict=True)}

    def _make_gradients(self) -> None:
        """Every adapter has a gradient before a pass is recorded, which then adds to it."""
        self.trainable = self.trainable or list(trainable_parameters(self.model).values())
        for parameter in self.trainable:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _leaves(gates: GateTensors) -> dict[str, Tensor]:
    return {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}


def _gradients_at(leaves: GateTensors) -> dict[str, Tensor]:
    return {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
