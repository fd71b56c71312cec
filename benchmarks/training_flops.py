"""The FLOPs of a training step and of a run, from shapes alone: two a multiplication of matrices and of attention.

A frozen weight takes 2 FLOPs a token forward, and 2 backward for the gradient of its input; it has no gradient itself.
`docs/research/scaling.md` has the FLOPs per second measured on devices, by which a step's seconds follow.
"""

from __future__ import annotations

from prunetune.cost.training_memory import TrainingPhase, TrainingSetup, TrainingShapes
from prunetune.pruning.linears import COLUMNS


def step_flops(
    shapes: TrainingShapes,
    setup: TrainingSetup,
    *,
    phase: TrainingPhase,
    tokens: int,
    length: int,
    label_share: float = 1.0,
) -> int:
    """FLOPs of one step on so many tokens, in examples of a length.

    In the search phase the generator has a pass of its own over as many tokens; scores take one without gradients of
    weights or adapters.
    `label_share` is the share of tokens that are labels, which the head reads. Tokens that a teacher sees go through
    the teacher and through both heads.
    """
    keep = setup.keep if setup.is_cut(phase) else 1.0
    linears = [linear.after_cut(keep) for linear in shapes.linears]
    is_merged = setup.is_cut(phase) and setup.all_weights
    weights = sum(linear.weight_count for linear in linears)
    adapters = 0 if is_merged else setup.rank * sum(linear.rows + linear.columns for linear in linears)
    # Attention scores and sums read half of a square of tokens, over all columns of consumers that are not MLPs'.
    channels = round(shapes.mlp_channels * keep)
    attention = 2 * length * (sum(linear.columns for linear in linears if linear.cut_axis == COLUMNS) - channels)
    head = shapes.vocab_size * shapes.hidden_size
    forward = 2 * (weights + adapters) + attention
    backward = 2 * (weights * (2 if is_merged and phase == "tune" else 1) + 2 * adapters) + 2 * attention
    teacher_share = setup.teacher_share if setup.teacher else 0.0
    teacher = 2 * sum(linear.weight_count for linear in shapes.linears) + attention + 2 * head
    layers = forward * (2 if setup.recompute else 1) + backward
    per_pass = layers + 4 * head * (label_share + teacher_share) + teacher_share * teacher
    passes = 2 if phase == "search" else 1
    frozen_adapters = 0 if phase == "tune" else 2 * adapters  # which have no gradient where gates have one
    return round(tokens * (passes * per_pass - frozen_adapters))
