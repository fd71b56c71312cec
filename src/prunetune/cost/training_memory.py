"""How much memory a run will hold, from shapes alone: what is counted exactly, and what a pass keeps for its gradient.

Weights, adapters, gradients and moments are counted to the byte. Activations are those of a decoder layer with
RMSNorm-like norms and frozen linears under adapters, as autograd keeps them; a kernel's own workspace, the allocator's
slack and the context of a CUDA process (about half a GB) are not in it. `docs/scaling.md` has measurements beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import torch

from prunetune.config.recipe import RunConfig
from prunetune.model.activation_checkpointing import uses_checkpointing
from prunetune.model.lm_head import LOGITS_PER_CHUNK
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear
from prunetune.pruning.nf4 import NF4_BLOCK_SIZE, NF4_SCALE_BYTES, cut_axes
from prunetune.pruning.shared_weights import can_share_weights
from prunetune.pruning.units import Site

FP32_BYTES = 4  # bytes of what is tuned, its gradient and each of its moments: float32
FEATURES = {"transformer": 64, "gru": 128, "none": 0}  # that the generator's heads read
MIXER = 100_000  # weights of the generator beside its heads


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear with adapters; `lines` is the axis that a cut shortens."""

    rows: int
    columns: int
    cut_axis: int
    can_share: bool = True  # whether what stays can be a teacher's first lines, see `model.shared`

    @property
    def weight_count(self) -> int:
        """Without a bias."""
        return self.rows * self.columns

    def after_cut(self, keep: float) -> AdaptedLinear:
        """What a plan leaves of it that keeps this share everywhere."""
        if self.cut_axis == ROWS:
            return replace(self, rows=round(keep * self.rows))
        return replace(self, columns=round(keep * self.columns))

    def weight_bytes(self, width: int, quantize: str) -> int:
        """Bytes of its weights."""
        if quantize == "off":
            return width * self.weight_count
        lines, length = (self.rows, self.columns) if self.cut_axis == ROWS else (self.columns, self.rows)
        return lines * -(-length // NF4_BLOCK_SIZE) * (NF4_BLOCK_SIZE // 2 + NF4_SCALE_BYTES)


@dataclass(frozen=True)
class TrainingShapes:
    """All of a model that memory depends on."""

    layers: int
    hidden_size: int
    vocab_size: int
    linears: tuple[AdaptedLinear, ...]  # of all layers
    other_params: int  # parameters beside their weights: embeddings, head, norms, biases, experts
    total_units: int  # of all sites
    mlp_channels: int  # of all MLPs


@dataclass(frozen=True)
class TrainingSetup:
    """All of a recipe that memory depends on."""

    dtype_bytes: int  # bytes of a number in the model's arithmetic
    tokens: int  # of one pass
    rank: int
    keep: float
    quantize: str = "off"
    recompute: bool = False  # train.checkpointing
    all_weights: bool = False  # once the model is cut
    joint: bool = False  # search.step
    teacher: bool = False
    share: float = 1.0  # of a batch that the teacher sees, in passes of their own; texts may be more, and are all seen
    shared: bool = False  # it is the untuned model, in its student's memory
    deep: bool = False  # the teacher's layers are followed, too
    generator: str = "transformer"


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at a phase's fullest moment."""

    weights: int  # frozen, of the model that is tuned
    tuned: int  # adapters (or, with all weights, the linears), gradients, moments
    generator: int  # the same of it
    activations: int  # that a pass keeps for its gradient
    passing: int  # that come and go: a portion's logits, or a layer computed again, and a linear out of 4 bits
    teacher: int  # what it does not share with the model that is tuned, and the layers' outputs that are compared

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(astuple(self))


def training_shapes(structure: Any, sites: Iterable[Site]) -> TrainingShapes:
    """Read off a plain model, which may stand on the meta device."""
    sites, text = tuple(sites), structure.config.get_text_config()
    lent = {part.module for site in sites if can_share_weights(site) for part, _ in site.linear_slices()}
    linears = []
    for name, lines in cut_axes(structure, sites).items():
        linear = get_base_linear(structure, name)
        linears.append(AdaptedLinear(axis_size(linear, ROWS), axis_size(linear, COLUMNS), lines, name in lent))
    everything = sum(parameter.numel() for parameter in structure.parameters())
    return TrainingShapes(
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        linears=tuple(linears),
        other_params=everything - sum(linear.weight_count for linear in linears),
        total_units=sum(site.units for site in sites),
        mlp_channels=sum(site.units for site in sites if site.kind == "mlp"),
    )


def training_setup(config: RunConfig, dtype: torch.dtype, *, longest: int, all_weights: bool = False) -> TrainingSetup:
    """Of a recipe; `longest`: tokens of the longest example."""
    batch, teacher = config.train.batch_size, config.distill.teacher != "none"
    share = (config.distill.share or 1.0) if teacher else 1.0
    seen = math.ceil(share * batch)
    return TrainingSetup(
        dtype_bytes=dtype.itemsize,
        tokens=min(max(seen, batch - seen) * longest, max(longest, config.train.micro_tokens)),
        rank=config.lora.rank,
        keep=config.budget.keep,
        quantize=config.lora.quantize,
        recompute=uses_checkpointing(config),
        all_weights=all_weights,
        joint=config.search.step == "joint",
        teacher=teacher,
        share=share,
        shared=config.distill.teacher == "base",
        deep=teacher and config.distill.hidden > 0,
        generator=config.search.generator,
    )


def estimate_memory(
    shapes: TrainingShapes, setup: TrainingSetup, *, phase: Literal["search", "tune"]
) -> TrainingMemory:
    """Of the dense model while it is searched, or of the cut one while it is tuned."""
    teacher = _teacher(shapes, setup, phase)
    if phase == "tune":
        shapes = replace(
            shapes,
            linears=tuple(linear.after_cut(setup.keep) for linear in shapes.linears),
            mlp_channels=round(setup.keep * shapes.mlp_channels),
        )
    merged = phase == "tune" and setup.all_weights
    held = sum(linear.weight_bytes(setup.dtype_bytes, setup.quantize) for linear in shapes.linears)
    every = sum(linear.weight_count for linear in shapes.linears)
    adapters = setup.rank * sum(linear.rows + linear.columns for linear in shapes.linears)
    heads = shapes.total_units * (FEATURES[setup.generator] + 1) + (MIXER if FEATURES[setup.generator] else 0)
    kept, layer, linear = _activations(shapes, setup, merged=merged, gated=phase == "search")
    return TrainingMemory(
        weights=setup.dtype_bytes * shapes.other_params + (0 if merged else held),
        tuned=3 * FP32_BYTES * every if merged else 4 * FP32_BYTES * adapters,
        generator=4 * FP32_BYTES * heads,
        activations=kept,
        passing=linear + max(layer, _logits(shapes, setup)),
        teacher=teacher + 2 * setup.tokens * shapes.layers * shapes.hidden_size * setup.dtype_bytes * setup.deep,
    )


def _teacher(shapes: TrainingShapes, setup: TrainingSetup, phase: Literal["search", "tune"]) -> int:
    """Bytes of a teacher's weights that are not the student's, too."""
    if not setup.teacher or (setup.shared and phase == "search"):
        return 0
    dense = sum(linear.weight_bytes(setup.dtype_bytes, setup.quantize) for linear in shapes.linears)
    if not setup.shared:
        return dense + setup.dtype_bytes * shapes.other_params
    lent = (linear.after_cut(setup.keep) for linear in shapes.linears if linear.can_share and not setup.all_weights)
    return dense - sum(linear.weight_bytes(setup.dtype_bytes, setup.quantize) for linear in lent)


def _activations(shapes: TrainingShapes, setup: TrainingSetup, *, merged: bool, gated: bool) -> tuple[int, int, int]:
    """Bytes that autograd keeps of one pass, of a layer that is computed again, and of one linear out of 4 bits."""
    width, places = setup.dtype_bytes, setup.tokens * shapes.layers * shapes.hidden_size
    made = sum(linear.rows for linear in shapes.linears if linear.cut_axis == ROWS)  # q, k, v, gate, up
    read = sum(linear.columns for linear in shapes.linears if linear.cut_axis == COLUMNS)  # by o and down
    wide = (
        made * (2 if gated and setup.joint else 1) + read + shapes.mlp_channels
    )  # before and after the gate; act(gate)
    kept = setup.tokens * width * wide
    kept += 2 * places * (width + FP32_BYTES)  # of both norms: the input in float32, and the output
    if merged:
        copied = sum(linear.weight_count for linear in shapes.linears)
    else:
        kept += setup.tokens * width * setup.rank * len(shapes.linears)
        copied = setup.rank * sum(linear.rows + linear.columns for linear in shapes.linears)
    kept += width * copied * (width < FP32_BYTES)  # what is float32 and multiplied in 16 bits: a copy for each product
    packed = setup.quantize != "off" and not merged
    dense = max(linear.weight_count for linear in shapes.linears) * width * packed
    if not setup.recompute:
        return kept, 0, dense
    # A layer is kept whole while its widest places (gate, up, their product) have gradients, too.
    again = (kept + 3 * setup.tokens * width * shapes.mlp_channels) // max(1, shapes.layers)
    return width * places, again, dense


def _logits(shapes: TrainingShapes, setup: TrainingSetup) -> int:
    """A portion's log-softmax, its gradient and that of the logits; with a teacher its own, and what lies between."""
    portion = min(setup.tokens, max(1, LOGITS_PER_CHUNK // shapes.vocab_size)) * shapes.vocab_size
    return portion * FP32_BYTES * (5 if setup.teacher else 3)
