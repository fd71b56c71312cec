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
from prunetune.model.activation_checkpointing import recomputes
from prunetune.model.lm_head import PORTION
from prunetune.pruning.linears import COLUMNS, ROWS, linear_of, size
from prunetune.pruning.nf4 import BLOCK, SCALE, lines_of
from prunetune.pruning.shared_weights import can_lend
from prunetune.pruning.units import Site

FULL = 4  # bytes of what is tuned, its gradient and each of its moments: float32
FEATURES = {"transformer": 64, "gru": 128, "none": 0}  # that the generator's heads read
MIXER = 100_000  # weights of the generator beside its heads


@dataclass(frozen=True)
class Linear:
    """A linear with adapters; `lines` is the axis that a cut shortens."""

    rows: int
    columns: int
    lines: int
    lent: bool = True  # whether what stays can be a teacher's first lines, see `model.shared`

    @property
    def weights(self) -> int:
        """Without a bias."""
        return self.rows * self.columns

    def cut(self, keep: float) -> Linear:
        """What a plan leaves of it that keeps this share everywhere."""
        if self.lines == ROWS:
            return replace(self, rows=round(keep * self.rows))
        return replace(self, columns=round(keep * self.columns))

    def held(self, width: int, quantize: str) -> int:
        """Bytes of its weights."""
        if quantize == "off":
            return width * self.weights
        lines, length = (self.rows, self.columns) if self.lines == ROWS else (self.columns, self.rows)
        return lines * -(-length // BLOCK) * (BLOCK // 2 + SCALE)


@dataclass(frozen=True)
class Shapes:
    """All of a model that memory depends on."""

    layers: int
    hidden: int
    vocabulary: int
    linears: tuple[Linear, ...]  # of all layers
    others: int  # parameters beside their weights: embeddings, head, norms, biases, experts
    units: int  # of all sites
    channels: int  # of all MLPs


@dataclass(frozen=True)
class Setup:
    """All of a recipe that memory depends on."""

    width: int  # bytes of a number in the model's arithmetic
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
class Memory:
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


def shapes_of(structure: Any, sites: Iterable[Site]) -> Shapes:
    """Read off a plain model, which may stand on the meta device."""
    sites, text = tuple(sites), structure.config.get_text_config()
    lent = {part.module for site in sites if can_lend(site) for part, _ in site.cuts()}
    linears = []
    for name, lines in lines_of(structure, sites).items():
        linear = linear_of(structure, name)
        linears.append(Linear(size(linear, ROWS), size(linear, COLUMNS), lines, name in lent))
    everything = sum(parameter.numel() for parameter in structure.parameters())
    return Shapes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        linears=tuple(linears),
        others=everything - sum(linear.weights for linear in linears),
        units=sum(site.units for site in sites),
        channels=sum(site.units for site in sites if site.kind == "mlp"),
    )


def setup_of(config: RunConfig, dtype: torch.dtype, *, longest: int, all_weights: bool = False) -> Setup:
    """Of a recipe; `longest`: tokens of the longest example."""
    batch, teacher = config.train.batch_size, config.distill.teacher != "none"
    share = (config.distill.share or 1.0) if teacher else 1.0
    seen = math.ceil(share * batch)
    return Setup(
        width=dtype.itemsize,
        tokens=min(max(seen, batch - seen) * longest, max(longest, config.train.micro_tokens)),
        rank=config.lora.rank,
        keep=config.budget.keep,
        quantize=config.lora.quantize,
        recompute=recomputes(config),
        all_weights=all_weights,
        joint=config.search.step == "joint",
        teacher=teacher,
        share=share,
        shared=config.distill.teacher == "base",
        deep=teacher and config.distill.hidden > 0,
        generator=config.search.generator,
    )


def memory(shapes: Shapes, setup: Setup, *, phase: Literal["search", "tune"]) -> Memory:
    """Of the dense model while it is searched, or of the cut one while it is tuned."""
    teacher = _teacher(shapes, setup, phase)
    if phase == "tune":
        shapes = replace(
            shapes,
            linears=tuple(linear.cut(setup.keep) for linear in shapes.linears),
            channels=round(setup.keep * shapes.channels),
        )
    merged = phase == "tune" and setup.all_weights
    held = sum(linear.held(setup.width, setup.quantize) for linear in shapes.linears)
    every = sum(linear.weights for linear in shapes.linears)
    adapters = setup.rank * sum(linear.rows + linear.columns for linear in shapes.linears)
    heads = shapes.units * (FEATURES[setup.generator] + 1) + (MIXER if FEATURES[setup.generator] else 0)
    kept, layer, linear = _activations(shapes, setup, merged=merged, gated=phase == "search")
    return Memory(
        weights=setup.width * shapes.others + (0 if merged else held),
        tuned=3 * FULL * every if merged else 4 * FULL * adapters,
        generator=4 * FULL * heads,
        activations=kept,
        passing=linear + max(layer, _logits(shapes, setup)),
        teacher=teacher + 2 * setup.tokens * shapes.layers * shapes.hidden * setup.width * setup.deep,
    )


def _teacher(shapes: Shapes, setup: Setup, phase: Literal["search", "tune"]) -> int:
    """Bytes of a teacher's weights that are not the student's, too."""
    if not setup.teacher or (setup.shared and phase == "search"):
        return 0
    dense = sum(linear.held(setup.width, setup.quantize) for linear in shapes.linears)
    if not setup.shared:
        return dense + setup.width * shapes.others
    lent = (linear.cut(setup.keep) for linear in shapes.linears if linear.lent and not setup.all_weights)
    return dense - sum(linear.held(setup.width, setup.quantize) for linear in lent)


def _activations(shapes: Shapes, setup: Setup, *, merged: bool, gated: bool) -> tuple[int, int, int]:
    """Bytes that autograd keeps of one pass, of a layer that is computed again, and of one linear out of 4 bits."""
    width, places = setup.width, setup.tokens * shapes.layers * shapes.hidden
    made = sum(linear.rows for linear in shapes.linears if linear.lines == ROWS)  # q, k, v, gate, up
    read = sum(linear.columns for linear in shapes.linears if linear.lines == COLUMNS)  # by o and down
    wide = made * (2 if gated and setup.joint else 1) + read + shapes.channels  # before and after the gate; act(gate)
    kept = setup.tokens * width * wide
    kept += 2 * places * (width + FULL)  # of both norms: the input in float32, and the output
    if merged:
        copied = sum(linear.weights for linear in shapes.linears)
    else:
        kept += setup.tokens * width * setup.rank * len(shapes.linears)
        copied = setup.rank * sum(linear.rows + linear.columns for linear in shapes.linears)
    kept += width * copied * (width < FULL)  # what is float32 and multiplied in 16 bits: a copy for each product
    packed = setup.quantize != "off" and not merged
    dense = max(linear.weights for linear in shapes.linears) * width * packed
    if not setup.recompute:
        return kept, 0, dense
    # A layer is kept whole while its widest places (gate, up, their product) have gradients, too.
    again = (kept + 3 * setup.tokens * width * shapes.channels) // max(1, shapes.layers)
    return width * places, again, dense


def _logits(shapes: Shapes, setup: Setup) -> int:
    """A portion's log-softmax, its gradient and that of the logits; with a teacher its own, and what lies between."""
    portion = min(setup.tokens, max(1, PORTION // shapes.vocabulary)) * shapes.vocabulary
    return portion * FULL * (5 if setup.teacher else 3)
