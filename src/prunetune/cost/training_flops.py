"""How many multiplications a step is, from shapes alone: two operations each, of matrices and of attention.

A frozen weight W costs 2 a weight and token forward, and 2 backward for what reads it; its own gradient is never made.
Seconds are these operations over what the device does of them in a second: that is measured, see `docs/scaling.md`.
"""

from __future__ import annotations

from typing import Literal

from prunetune.cost.training_memory import TrainingSetup, TrainingShapes
from prunetune.pruning.linears import COLUMNS


def step_flops(
    shapes: TrainingShapes,
    setup: TrainingSetup,
    *,
    phase: Literal["search", "tune"],
    tokens: int,
    length: int,
    label_share: float = 1.0,
) -> int:
    """Of one step on `tokens` in examples of `length`; a search step's generator sees as many again.

    `answers`: the share of tokens that are labels, which the head reads; of what a teacher sees it reads all, once
    more. With `search.step: joint` there is one pass for both players.
    """
    linears = [linear.after_cut(setup.keep) for linear in shapes.linears] if phase == "tune" else list(shapes.linears)
    merged = phase == "tune" and setup.all_weights
    weights = sum(linear.weight_count for linear in linears)
    adapters = 0 if merged else setup.rank * sum(linear.rows + linear.columns for linear in linears)
    # Scores and sums over the places before, half of a square, of the heads: all that consumers read but MLPs do not.
    channels = round(shapes.mlp_channels * (setup.keep if phase == "tune" else 1))
    attended = 2 * length * (sum(linear.columns for linear in linears if linear.cut_axis == COLUMNS) - channels)
    read = shapes.vocab_size * shapes.hidden_size
    forward = 2 * (weights + adapters) + attended
    backward = 2 * (weights * (2 if merged else 1) + 2 * adapters) + 2 * attended
    seen = setup.share if setup.teacher else 0.0
    taught = 2 * sum(linear.weight_count for linear in shapes.linears) + attended + 2 * read  # the teacher's own pass
    passes = forward + backward + (forward if setup.recompute else 0) + 4 * read * (label_share + seen) + seen * taught
    players = 2 if phase == "search" and not setup.joint else 1
    slopes = 2 * adapters if players == 2 else 0  # frozen adapters have no gradient of their own
    return round(tokens * (players * passes - slopes))
