"""Open a written checkpoint in a fresh process with stock transformers, and compare its logits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunetune.errors import SelfCheckFailed
from prunetune.export.checkpoint import WrittenCheckpoint

LIMIT = 1e-4  # largest relative difference of logits, float32

# Runs without prunetune, as whoever receives the checkpoint would.
READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
folder, tokens, logits, code, scratch = sys.argv[1:]
# With a scratch folder: weights stay in their files, and are read as they are needed.
how = {"device_map": {"": "disk"}, "offload_folder": scratch} if scratch else {}
model = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=code == "code", **how
).eval()
with torch.inference_mode():
    found = model(load_file(tokens)["tokens"]).logits
tied = getattr(model, "all_tied_weights_keys", None) or {}  # weights that stay in files are not one and the same
params = torch.tensor(sum(p.numel() for name, p in model.named_parameters() if name not in tied))
save_file({"logits": found.contiguous(), "params": params}, logits)
"""


@dataclass(frozen=True)
class SelfCheck:
    """What the comparison found."""

    max_relative: float  # largest difference of logits over the largest logit
    tokens: int
    limit: float = LIMIT
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@torch.inference_mode()
def compute_logits(model: Any, tokens: Tensor) -> Tensor:
    """[B, T] ids -> [B, T, V] float32 logits on the CPU."""
    return model(tokens.to(next(model.parameters()).device)).logits.float().cpu()  # type: ignore[no-any-return]


def check_checkpoint(
    written: WrittenCheckpoint, tokens: Tensor, expected: Tensor, *, streamed: bool = False
) -> SelfCheck:
    """Compare; raises `SelfCheckFailed` above 1e-4 relative, or where the parameter count differs.

    `streamed`: the fresh process has one layer in memory at a time.
    """
    found = reopen_in_fresh_process(written, tokens, streamed=streamed)
    count = int(found["params"])
    if count != written.params:
        raise SelfCheckFailed(
            f"{written.folder} opens with {count:,} parameters, {written.params:,} were written; the run is kept"
        )
    difference = float((found["logits"] - expected).abs().max() / expected.abs().max())
    if not difference <= LIMIT:  # NaN fails too
        raise SelfCheckFailed(
            f"{written.folder} differs from the gated model by {difference:.2e} relative (limit {LIMIT:.0e}): "
            "do not use it; the run's checkpoints are kept, please report this"
        )
    return SelfCheck(difference, tokens.numel())


def reopen_in_fresh_process(written: WrittenCheckpoint, tokens: Tensor, *, streamed: bool = False) -> dict[str, Tensor]:
    """What a fresh process finds, in float32: `logits` and the number of `params`; raises `SelfCheckFailed`."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "tokens.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"tokens": tokens.contiguous()}, inputs)
        code, spill = "code" if written.needs_code else "plain", scratch if streamed else ""
        # Generated modules are cached by folder name; a scratch cache keeps an older run's code out.
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "TOKENIZERS_PARALLELISM": "false"}
        reader = subprocess.run(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-c", READER, str(written.folder.absolute()), str(inputs), str(outputs), code, spill],
            capture_output=True, text=True, env=environment, cwd=scratch, check=False,
        )  # fmt: skip
        if reader.returncode:
            last = (reader.stderr.strip().splitlines() or ["no output"])[-1]
            raise SelfCheckFailed(f"{written.folder} does not open in a fresh process: {last}")
        return load_file(outputs)
