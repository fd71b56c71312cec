"""What goes wrong in a step and need not end a run: numbers that are none, and memory that runs out.

Both change what the run does from then on, so both are part of its state: a resumed run goes on as it would have.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from prunetune.data.encoding import Example
from prunetune.errors import ModelError
from prunetune.train.cuda_graphs import CAPTURE_LOCK
from prunetune.train.passes import Passes

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class StepGuard:
    """What a run has met so far: each batch left out halves the learning rates, each lack of memory the passes."""

    passes: Passes
    max_skipped: int  # batches that may be left out
    may_recompute: bool = True  # where a single example is too large
    skipped: int = 0

    @property
    def lr_scale(self) -> float:
        """What learning rates are multiplied by."""
        return 0.5**self.skipped

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `restore` reads it back."""
        return {"skipped": self.skipped, "micro_tokens": self.passes.micro_tokens, "recompute": self.passes.recompute}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint had met."""
        self.skipped = int(values.get("skipped", 0))
        self.passes.micro_tokens = int(values.get("micro_tokens", self.passes.micro_tokens))
        self.passes.recompute = bool(values.get("recompute", self.passes.recompute))

    def should_skip(self, step: int, found: Mapping[str, float], batch: Sequence[Example]) -> bool:
        """Whether the step's update is to be left out, which is counted and told; False where all is finite.

        Raises `ModelError` with the rows of the batch where it is one too many.
        """
        worst = next((name for name, value in found.items() if not math.isfinite(value)), None)
        if worst is None:
            return False
        self.skipped += 1
        rows = f" (rows {', '.join(example.id for example in batch[:3])}, ...)" if batch else ""
        what = f"the {worst} is {found[worst]} at step {step + 1}{rows}"
        if self.skipped > self.max_skipped:
            raise ModelError(
                f"{what}, and {self.max_skipped} batches were left out before: "
                "look at these rows, lower the learning rates, or set dtype float32; then go on with --resume"
            )
        log.warning("%s: the batch is left out, and learning rates are halved from here on", what)
        return True

    def retry_smaller(self, examples: Sequence[Example], work: Callable[[], T], undo: Callable[[], None]) -> T:
        """`work()`, in passes half as large where a GPU's memory runs out, `undo()` first; examples stay the same.

        Where a single example is too large, layers are computed twice from then on. Raises torch's error where it
        still is.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                smaller = self.passes.micro_tokens // 2
                fits = smaller >= max(len(example.token_ids) for example in examples)
                if not fits and (self.passes.recompute or not self.may_recompute):
                    raise
            # Out of the handler, whose traceback held the tensors of the pass.
            if fits:
                log.warning("out of GPU memory: passes of %d tokens from here on, of the same examples", smaller)
                self.passes.micro_tokens = smaller
            else:
                log.warning("out of GPU memory with one example: activations are computed twice from here on (slower)")
                self.passes.recompute = True
            self.passes.reset_recordings()
            undo()
            if torch.cuda.is_available():
                with CAPTURE_LOCK:  # a recording of another thread's would be lost
                    torch.cuda.empty_cache()
