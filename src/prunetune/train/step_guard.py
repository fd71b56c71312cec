"""Recovery from a failed step: a batch without finite numbers is skipped, a pass that runs out of memory made smaller.

Both change the steps that follow, so both are part of every checkpoint: a resumed run continues as it would have.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from prunetune.data.encoding import Example
from prunetune.errors import ModelError
from prunetune.train.passes import Passes
from prunetune.utils.threads import CAPTURE_LOCK

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class StepGuard:
    """Counts skipped batches, each of which halves the learning rates; halves passes that run out of memory."""

    passes: Passes
    max_skipped: int  # skipped batches after which the run fails
    may_recompute: bool = True  # layers, if a single example is too large
    skipped: int = 0

    @property
    def lr_scale(self) -> float:
        """Factor of all learning rates."""
        return 0.5**self.skipped

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `restore` reads it back."""
        return {"skipped": self.skipped, **asdict(self.passes.size)}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint holds."""
        size = self.passes.size
        self.skipped = int(values.get("skipped", 0))
        size.micro_tokens = int(values.get("micro_tokens", size.micro_tokens))
        size.recompute = bool(values.get("recompute", size.recompute))

    def should_skip(self, step: int, values: Mapping[str, float], batch: Sequence[Example]) -> bool:
        """Whether a value of the step is not finite, so that its update is to be skipped; this is counted and logged.

        Raises `ModelError` with rows of the batch if more than `max_skipped` batches were.
        """
        name = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if name is None:
            return False
        self.skipped += 1
        rows = f" (rows {', '.join(example.id for example in batch[:3])}, ...)" if batch else ""
        problem = f"the {name} is {values[name]} at step {step + 1}{rows}"
        if self.skipped > self.max_skipped:
            raise ModelError(
                f"{problem}, and {self.max_skipped} batches were skipped before: "
                "look at these rows, lower the learning rates, or set dtype float32; then continue with --resume"
            )
        log.warning("%s: the batch is skipped, and learning rates are halved from here on", problem)
        return True

    def retry_smaller(self, examples: Sequence[Example], work: Callable[[], T], undo: Callable[[], None]) -> T:
        """`work()`; if GPU memory runs out, `undo()` and again in passes half as large, of the same examples.

        If a single example is too large, activations are recomputed from then on (`train.checkpointing`). Raises
        torch's error if that does not help, either.
        """
        size = self.passes.size
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                smaller = size.micro_tokens // 2
                fits = smaller >= max(len(example.token_ids) for example in examples)
                if not fits and (size.recompute or not self.may_recompute):
                    raise
            # Out of the handler, whose traceback held the tensors of the pass.
            if fits:
                log.warning("out of GPU memory: passes of %d tokens from here on, of the same examples", smaller)
                size.micro_tokens = smaller
            else:
                log.warning("out of GPU memory with one example: activations are recomputed from here on (slower)")
                size.recompute = True
            self.passes.reset_recordings()
            undo()
            if torch.cuda.is_available():
                with CAPTURE_LOCK:  # it would break the recording of another thread
                    torch.cuda.empty_cache()
