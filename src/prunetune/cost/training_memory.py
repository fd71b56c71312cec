"""The memory of a training run, estimated from shapes alone.

Weights, adapters, gradients and moments are counted to the byte. Activations are those that autograd keeps of a decoder
layer with RMSNorm-like norms and frozen linears with adapters. Kernel workspaces, fragmentation and the context of a
CUDA process (about half a GB) are not counted. `docs/research/scaling.md` compares estimates with measurements.
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal, Self

import torch

from prunetune.config.recipe import RunConfig
from prunetune.model.activation_checkpointing import uses_checkpointing
from prunetune.model.lm_head import LOGITS_PER_CHUNK
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear
from prunetune.pruning.nf4 import NF4_BLOCK_SIZE, NF4_SCALE_BYTES, cut_axes
from prunetune.pruning.teacher_student_weights import can_share_weights
from prunetune.pruning.units import Site, UnitKind

# A generator's search on the dense model; the scores that decide a cut, on the model as it then is; tuning after a cut.
TrainingPhase = Literal["search", "scores", "tune"]
FP32_BYTES = 4  # trained parameters, their gradients and their moments are float32
GENERATOR_FEATURES = 64  # inputs of the generator's heads
GENERATOR_ENCODER_PARAMS = 100_000  # the generator without its heads, roughly


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear with adapters."""

    rows: int
    columns: int
    cut_axis: int  # the axis that a cut shortens
    can_share: bool = True  # whether its cut weight can be a view of a teacher's, see `pruning.teacher_student_weights`

    @property
    def weight_count(self) -> int:
        """Weights without the bias."""
        return self.rows * self.columns

    def after_cut(self, keep: float) -> Self:
        """The linear after a plan that keeps this share of every site."""
        if self.cut_axis == ROWS:
            return replace(self, rows=round(keep * self.rows))
        return replace(self, columns=round(keep * self.columns))

    def weight_bytes(self, dtype_bytes: int, quantize: str) -> int:
        """Bytes of its weight, in a dtype or in 4 bits (`lora.quantize`)."""
        if quantize == "off":
            return dtype_bytes * self.weight_count
        count, length = (self.rows, self.columns) if self.cut_axis == ROWS else (self.columns, self.rows)
        return count * -(-length // NF4_BLOCK_SIZE) * (NF4_BLOCK_SIZE // 2 + NF4_SCALE_BYTES)


@dataclass(frozen=True)
class TrainingShapes:
    """The sizes of a model that memory depends on."""

    layers: int
    hidden_size: int
    vocab_size: int
    linears: tuple[AdaptedLinear, ...]  # of all layers
    other_params: int  # all parameters but their weights: embeddings, head, norms, biases, experts
    total_units: int  # of all sites
    mlp_channels: int  # of all MLPs


@dataclass(frozen=True)
class TrainingSetup:
    """The options of a recipe that memory depends on."""

    dtype_bytes: int  # of a number in the model's arithmetic
    tokens: int  # of one pass
    rank: int
    keep: float  # of the model in the phase; in "scores", 1 before the first cut
    quantize: str = "off"
    recompute: bool = False  # train.checkpointing
    all_weights: bool = False  # all weights are tuned after the cut, instead of adapters
    teacher: bool = False
    teacher_share: float = 1.0  # of a batch's labelled rows that the teacher sees, in passes of their own
    teacher_is_base: bool = False  # the teacher is the untuned model, which shares its student's memory
    distills_hidden: bool = False  # layers' outputs are compared, too
    uses_generator: bool = False

    def is_cut(self, phase: TrainingPhase) -> bool:
        """Whether the model has been cut in this phase."""
        return phase == "tune" or (phase == "scores" and self.keep < 1)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a phase."""

    weights: int  # frozen weights of the model that is tuned
    tuned: int  # adapters (or, with all weights, the linears), their gradients and moments
    generator: int  # its parameters, gradients and moments
    activations: int  # kept by a pass for its gradient
    passing: int  # held for a moment: a chunk's logits, or a recomputed layer, and one dequantised linear
    teacher: int  # weights that it does not share with the model that is tuned, and layers' outputs that are compared

    @property
    def total(self) -> int:
        return sum(astuple(self))


def training_shapes(meta_model: Any, sites: Iterable[Site]) -> TrainingShapes:
    """Read the sizes of a model without adapters, which may be on the meta device."""
    sites, config = tuple(sites), meta_model.config.get_text_config()
    shareable = {linear.module for site in sites if can_share_weights(site) for linear, _ in site.linear_slices()}
    linears = []
    for name, axis in cut_axes(meta_model, sites).items():
        linear = get_base_linear(meta_model, name)
        linears.append(AdaptedLinear(axis_size(linear, ROWS), axis_size(linear, COLUMNS), axis, name in shareable))
    all_params = sum(parameter.numel() for parameter in meta_model.parameters())
    return TrainingShapes(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        linears=tuple(linears),
        other_params=all_params - sum(linear.weight_count for linear in linears),
        total_units=sum(site.units for site in sites),
        mlp_channels=sum(site.units for site in sites if site.kind is UnitKind.MLP_CHANNEL),
    )


def training_setup(config: RunConfig, dtype: torch.dtype, *, longest: int, all_weights: bool = False) -> TrainingSetup:
    """The setup of a recipe; `longest` is the number of tokens of the longest example."""
    batch, has_teacher = config.train.batch_size, config.distill.teacher != "none"
    teacher_share = (config.distill.share or 1.0) if has_teacher else 1.0
    taught_rows = math.ceil(teacher_share * batch)
    return TrainingSetup(
        dtype_bytes=dtype.itemsize,
        tokens=min(max(taught_rows, batch - taught_rows) * longest, max(longest, config.train.micro_tokens)),
        rank=config.lora.rank,
        keep=config.budget.keep,
        quantize=config.lora.quantize,
        recompute=uses_checkpointing(config),
        all_weights=all_weights,
        teacher=has_teacher,
        teacher_share=teacher_share,
        teacher_is_base=config.distill.teacher == "base",
        distills_hidden=has_teacher and config.distill.hidden > 0,
        uses_generator=config.search.method == "generator",
    )


def estimate_memory(shapes: TrainingShapes, setup: TrainingSetup, *, phase: TrainingPhase) -> TrainingMemory:
    """Peak memory of a phase. Before the first cut, adapters that are only scored have no gradient and no moments."""
    teacher = 0  # weights that it does not share with the student, and layers' outputs
    if setup.teacher and (setup.is_cut(phase) or not setup.teacher_is_base):
        teacher = sum(linear.weight_bytes(setup.dtype_bytes, setup.quantize) for linear in shapes.linears)
        if not setup.teacher_is_base:
            teacher += setup.dtype_bytes * shapes.other_params
        elif not setup.all_weights:
            shared = [linear.after_cut(setup.keep) for linear in shapes.linears if linear.can_share]
            teacher -= sum(linear.weight_bytes(setup.dtype_bytes, setup.quantize) for linear in shared)
    teacher += 2 * setup.tokens * shapes.layers * shapes.hidden_size * setup.dtype_bytes * setup.distills_hidden
    if setup.is_cut(phase):
        linears = tuple(linear.after_cut(setup.keep) for linear in shapes.linears)
        shapes = replace(shapes, linears=linears, mlp_channels=round(setup.keep * shapes.mlp_channels))
    is_merged = setup.is_cut(phase) and setup.all_weights
    linear_bytes = sum(linear.weight_bytes(setup.dtype_bytes, setup.quantize) for linear in shapes.linears)
    linear_params = sum(linear.weight_count for linear in shapes.linears)
    adapter_params = setup.rank * sum(linear.rows + linear.columns for linear in shapes.linears)
    adapter_copies = 1 if phase == "scores" and not setup.is_cut(phase) else 4  # with gradients and two moments
    generator_params = shapes.total_units * GENERATOR_FEATURES + GENERATOR_ENCODER_PARAMS
    # What autograd keeps of one pass. The MLP keeps its activation of gate.
    dtype_bytes, hidden = setup.dtype_bytes, setup.tokens * shapes.layers * shapes.hidden_size
    produced = sum(linear.rows for linear in shapes.linears if linear.cut_axis == ROWS)  # q, k, v, gate, up
    consumed = sum(linear.columns for linear in shapes.linears if linear.cut_axis == COLUMNS)  # by o and down
    activations = setup.tokens * dtype_bytes * (produced + consumed + shapes.mlp_channels)
    activations += 2 * hidden * (dtype_bytes + FP32_BYTES)  # of both norms: the input in float32, and the output
    activations += 0 if is_merged else setup.tokens * dtype_bytes * setup.rank * len(shapes.linears)
    # float32 weights that are multiplied in 16 bits: a copy for each product.
    activations += dtype_bytes * (linear_params if is_merged else adapter_params) * (dtype_bytes < FP32_BYTES)
    is_packed = setup.quantize != "off" and not is_merged
    dequantized = max(linear.weight_count for linear in shapes.linears) * dtype_bytes * is_packed
    recomputed_layer = 0
    if setup.recompute:
        # One layer is kept whole while its widest activations (gate, up, their product) have gradients, too.
        widest = 3 * setup.tokens * dtype_bytes * shapes.mlp_channels
        recomputed_layer = (activations + widest) // max(1, shapes.layers)
        activations = dtype_bytes * hidden
    chunk = min(setup.tokens, max(1, LOGITS_PER_CHUNK // shapes.vocab_size)) * shapes.vocab_size
    # Log-softmax, its gradient and that of the logits; with a teacher also the teacher's and their difference.
    logits = chunk * FP32_BYTES * (5 if setup.teacher else 3)
    return TrainingMemory(
        weights=setup.dtype_bytes * shapes.other_params + (0 if is_merged else linear_bytes),
        tuned=3 * FP32_BYTES * linear_params if is_merged else adapter_copies * FP32_BYTES * adapter_params,
        generator=4 * FP32_BYTES * generator_params if setup.uses_generator else 0,
        activations=activations,
        passing=dequantized + max(recomputed_layer, logits),
        teacher=teacher,
    )
