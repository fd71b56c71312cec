"""Forward and backward passes: padded anywhere, packed and recorded on a GPU, with the same losses and gradients."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import InitVar, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from prunetune.config.recipe import RunConfig
from prunetune.data.batches import PackedBatch, group_for_packing, pack_examples
from prunetune.data.encoding import Example
from prunetune.model.activation_checkpointing import use_checkpointing, uses_checkpointing
from prunetune.model.compiled_kernels import use_compiled_kernels
from prunetune.model.sequence_packing import supports_packing, use_packed_attention
from prunetune.pruning.masking import AdapterGating, masked
from prunetune.pruning.units import Site, prunable_params
from prunetune.train.adapters import (
    LARGE_MODEL_PARAMS,
    frozen_adapters,
    lora_dropout_enabled,
    trainable_parameters,
)
from prunetune.train.cuda_graphs import CudaGraphRecorder
from prunetune.train.forward import Teacher, inputs_from_pack, micro_batch_inputs, split_by_teacher
from prunetune.train.losses import TrainingLoss, mean_loss, summed_answer_loss
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks

log = logging.getLogger(__name__)

COMPILE_MIN_STEPS = 1000  # steps from which compiling pays
LARGE_MODEL_COMPILE_MIN_STEPS = 300  # compiling takes 20 s of a model of 8e9, and saves a fifth of each step
# Lengths of packed rows are multiples of TOKEN_STEP times this, by the most steps that a recording is replayed for:
# each length is recorded anew after a cut, which takes as long as twenty replays of a small model. A large one's time
# and memory go with its tokens, padding included.
STEP_FACTORS = {300: 4, 2000: 2}
LARGE_MODEL_STEP_FACTOR = 0.5
PackKind = Literal["tune", "gate gradients", "score"]
GateTensors = Mapping[str, Tensor]
Losses = Mapping[str, float]  # by metric, see `losses.TERMS`
# Over a row, with its teacher; by metric, what a sum over the row is multiplied by to give its part of the mean.
PackFunction = Callable[[PackedBatch, Mapping[str, Tensor], Teacher | None], None]


@dataclass
class PassSize:
    """How much memory a pass takes: a `StepGuard` lowers it where memory runs out."""

    micro_tokens: int  # most tokens of one pass
    recompute: bool  # layers are computed again for the backward pass, see `model/activation_checkpointing.py`


class Passes(Protocol):
    """What generator and adapter steps need of the model.

    Losses are means over the batch, by metric; gradients are of their sum.
    """

    size: PassSize

    def tune(self, examples: Sequence[Example], gates: GateTensors | None) -> Losses:
        """Losses of the LoRA-aware forward (or of the model as it is); adapters accumulate their gradient."""

    def gate_gradients(self, examples: Sequence[Example], gates: GateTensors) -> tuple[Losses, GateTensors]:
        """Losses of the gated model with frozen adapters, and their gradient at each gate: {site: [U]}."""

    def score(self, examples: Sequence[Example], gates: GateTensors | None) -> float:
        """Mean answer loss of the gated model (or of the model as it is), no gradient."""

    def use_sites(self, sites: Sequence[Site], steps: int) -> None:
        """The model has been cut: these are its sites now, for so many steps."""

    def reset_recordings(self) -> None:
        """Forget recorded passes: they are made anew, of another size."""


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


@dataclass(eq=False)
class _BasePasses:
    """What padded and packed passes share: model, sites, teacher, the loss and how adapters are gated."""

    model: Any
    sites: Sequence[Site]
    pad_id: int
    config: InitVar[RunConfig]
    teacher: Teacher | None = None
    ranks: Ranks = SINGLE_PROCESS

    def __post_init__(self, config: RunConfig) -> None:
        self.loss = TrainingLoss.from_config(config, has_teacher=self.teacher is not None)
        self.size = PassSize(config.train.micro_tokens, uses_checkpointing(config))

    def use_sites(self, sites: Sequence[Site], steps: int) -> None:
        self.sites = sites

    def _checkpointed(self) -> AbstractContextManager[object]:
        return use_checkpointing(self.model) if self.size.recompute else nullcontext()


class PaddedPasses(_BasePasses):
    """Examples side by side in padded batches, run as they come."""

    def tune(self, examples: Sequence[Example], gates: GateTensors | None) -> Losses:
        with lora_dropout_enabled(self.model), self._gated(gates, "free"):
            return self._backward(examples)

    def gate_gradients(self, examples: Sequence[Example], gates: GateTensors) -> tuple[Losses, GateTensors]:
        leaves = {name: gate.detach().clone().requires_grad_() for name, gate in gates.items()}
        with frozen_adapters(self.model), masked(self.model, leaves, sites=self.sites):
            losses = self._backward(examples)
        return losses, {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}

    def score(self, examples: Sequence[Example], gates: GateTensors | None) -> float:
        with self._gated(gates, "gated"):
            return mean_loss(self.model, examples, self.pad_id, self.size.micro_tokens, self.ranks)

    def reset_recordings(self) -> None:
        pass

    def _backward(self, examples: Sequence[Example]) -> Losses:
        """Add the gradients of a batch's loss to the weights'; of several ranks each has its share, which add up."""
        device = next(self.model.parameters()).device
        totals = {metric: torch.zeros((), device=device) for metric in self.loss.metrics}
        with self._checkpointed():
            for seen_by, subset in split_by_teacher(examples, self.teacher):
                counts = self.loss.normalisers(examples, subset)
                for inputs in micro_batch_inputs(subset, self.pad_id, self.size.micro_tokens, device, self.ranks):
                    losses = self.loss(self.model, inputs, seen_by)
                    means = {metric: value / counts[metric] for metric, value in losses.items()}
                    torch.stack(list(means.values())).sum().backward()  # type: ignore[no-untyped-call]
                    for metric, mean in means.items():
                        totals[metric] += mean.detach()
        return {metric: float(total) for metric, total in totals.items()}

    def _gated(self, gates: GateTensors | None, mode: AdapterGating) -> AbstractContextManager[object]:
        return nullcontext() if gates is None else masked(self.model, gates, adapters=mode, sites=self.sites)


class PackedPasses(_BasePasses):
    """Examples end to end in one row (no padding), each shape of row recorded as one CUDA graph.

    Recorded kernels know addresses, not names: gates, gradients and sums stay in the same tensors throughout. Whoever
    clears the adapters' gradients zeroes them in place; one that is set to None is lost to the recordings.
    """

    def __post_init__(self, config: RunConfig) -> None:
        super().__post_init__(config)
        self.device = next(self.model.parameters()).device
        self.recorder = CudaGraphRecorder(self.device)
        self.is_large = prunable_params(self.sites) >= LARGE_MODEL_PARAMS  # as loaded, and so to the end
        pays_from = LARGE_MODEL_COMPILE_MIN_STEPS if self.is_large else COMPILE_MIN_STEPS
        mode = config.train.compile
        self.compiles = mode == "on" or (mode == "auto" and config.train.steps >= pays_from)
        self.loss = TrainingLoss(self.loss.weights, self.compiles)
        self.trainable: list[nn.Parameter] = []  # looked up once for all passes: a walk over a large model takes long
        self.totals = torch.zeros(len(self.loss.metrics), device=self.device)  # read at once: one wait for the GPU
        self.sums = dict(zip(self.loss.metrics, self.totals, strict=True))  # views, by metric
        self.use_sites(self.sites, config.train.steps)

    def tune(self, examples: Sequence[Example], gates: GateTensors | None) -> Losses:
        self.trainable = self.trainable or list(trainable_parameters(self.model).values())
        for parameter in self.trainable:  # a recorded pass adds to gradients that are there
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self._run_packs("tune", examples, gates, self._forward_backward)

    def gate_gradients(self, examples: Sequence[Example], gates: GateTensors) -> tuple[Losses, GateTensors]:
        assert self.gates.grad is not None
        self.gates.grad.zero_()
        losses = self._run_packs("gate gradients", examples, gates, self._forward_backward)
        return losses, self._by_site(self.gates.grad.clone())

    def score(self, examples: Sequence[Example], gates: GateTensors | None) -> float:
        return self._run_packs("score", examples, gates, self._score)["loss"]

    def use_sites(self, sites: Sequence[Site], steps: int) -> None:
        self.sites = sites
        by_steps = next((factor for most, factor in STEP_FACTORS.items() if steps <= most), 1)
        self.step_factor = LARGE_MODEL_STEP_FACTOR if self.is_large else by_steps
        self.gates = torch.zeros(sum(site.units for site in sites), device=self.device, requires_grad=True)
        self.gates.grad = torch.zeros_like(self.gates)
        self.reset_recordings()

    def reset_recordings(self) -> None:
        self.recorder.reset_recordings()
        self.trainable = []

    def _run_packs(
        self, kind: PackKind, examples: Sequence[Example], gates: GateTensors | None, function: PackFunction
    ) -> Losses:
        """Run `function` on packs of all examples, recorded by kind, teacher and shape; mean losses by metric."""
        self.totals.zero_()
        if gates is not None:
            self.gates.detach().copy_(torch.cat([gates[site.name].detach() for site in self.sites]))
        for seen_by, subset in split_by_teacher(examples, None if kind == "score" else self.teacher):
            counts = self.loss.normalisers(examples, subset)
            shares = torch.tensor([1 / counts[metric] for metric in self.loss.metrics])
            local = self.ranks.split_examples(subset)[self.ranks.rank]
            for group in group_for_packing(local, self.size.micro_tokens):
                pack = pack_examples(group, self.pad_id, max_sequences=len(examples), step_factor=self.step_factor)

                def run(inputs: Sequence[Tensor], pack: PackedBatch = pack, seen_by: Teacher | None = seen_by) -> None:
                    by_metric = dict(zip(self.loss.metrics, inputs[-1], strict=True))
                    with nullcontext() if gates is None else self._gated(kind):
                        function(pack.with_tensors(inputs[:-1]), by_metric, seen_by)

                key = ((kind, gates is None), seen_by is None, *pack.shape_key)
                self.recorder.run(key, run, [*pack.tensors(), shares])
        return dict(zip(self.loss.metrics, self.totals.tolist(), strict=True))

    @contextmanager
    def _gated(self, kind: PackKind) -> Iterator[None]:
        mode: AdapterGating = "free" if kind == "tune" else "gated"
        differentiable = kind == "gate gradients"
        gates = self._by_site(self.gates if differentiable else self.gates.detach())
        with (
            frozen_adapters(self.model) if differentiable else nullcontext(),
            masked(self.model, gates, adapters=mode, sites=self.sites),
        ):
            yield

    def _forward_backward(self, row: PackedBatch, shares: Mapping[str, Tensor], teacher: Teacher | None) -> None:
        with self._packed(), self._checkpointed():
            losses = self.loss(self.model, inputs_from_pack(row), teacher)
            means = {metric: value * shares[metric] for metric, value in losses.items()}
            torch.stack(list(means.values())).sum().backward()  # type: ignore[no-untyped-call]
        for metric, mean in means.items():
            self.sums[metric] += mean.detach()

    @contextmanager
    def _packed(self) -> Iterator[None]:
        models = [self.model, *([self.teacher.model] if self.teacher else [])]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(use_packed_attention(model))
            if self.compiles:
                stack.enter_context(use_compiled_kernels(*models))
            yield

    @torch.no_grad()
    def _score(self, row: PackedBatch, shares: Mapping[str, Tensor], _: Teacher | None = None) -> None:
        with self._packed():
            self.sums["loss"] += summed_answer_loss(self.model, inputs_from_pack(row)) * shares["loss"]

    def _by_site(self, flat: Tensor) -> dict[str, Tensor]:
        """[all units] as {site: [U]}."""
        by_site = torch.split(flat, [site.units for site in self.sites])
        return {site.name: values for site, values in zip(self.sites, by_site, strict=True)}
