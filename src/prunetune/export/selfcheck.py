"""Open a written checkpoint in a fresh process with stock transformers, and compare its logits."""

import logging
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
from prunetune.utils.failures import last_line

log = logging.getLogger(__name__)
LIMIT = 1e-4  # largest relative difference of logits, float32

# Runs without prunetune, as a user of the checkpoint would.
READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
folder, tokens, logits, code, scratch = sys.argv[1:]
# With a scratch folder: weights stay in their files, and are read as they are needed.
options = {"device_map": {"": "disk"}, "offload_folder": scratch} if scratch else {}
config = AutoConfig.from_pretrained(folder, trust_remote_code=code == "code")
auto = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
model = auto.from_pretrained(
    folder, dtype=torch.float32, trust_remote_code=code == "code", **options
).eval()
with torch.inference_mode():
    output = model(load_file(tokens)["tokens"]).logits
tied = getattr(model, "all_tied_weights_keys", None) or {}  # tied weights that stay in files are separate tensors
params = torch.tensor(sum(p.numel() for name, p in model.named_parameters() if name not in tied))
save_file({"logits": output.contiguous(), "params": params}, logits)
"""


@dataclass(frozen=True)
class SelfCheck:
    """The result of comparing a checkpoint's logits with those of the gated model."""

    max_relative: float  # largest difference of logits over the largest logit
    tokens: int
    limit: float = LIMIT
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The values for the manifest."""
        return asdict(self)


@torch.inference_mode()
def compute_logits(model: Any, tokens: Tensor) -> Tensor:
    """[B, T] ids -> [B, T, V] float32 logits on the CPU."""
    return model(tokens.to(next(model.parameters()).device)).logits.float().cpu()  # type: ignore[no-any-return]


def compare_logits(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Root mean square error as a share of the expected logits' root mean square; share of equal most likely tokens."""
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean()
    return float((logits - expected).norm() / expected.norm()), float(same)


def check_checkpoint(
    written: WrittenCheckpoint, tokens: Tensor, expected: Tensor, *, streamed: bool = False
) -> SelfCheck:
    """Open the checkpoint in a fresh process, and compare its logits with those `expected`, [B, T, V].

    `streamed`: the fresh process has one layer in memory at a time.
    Raises `SelfCheckFailed` above 1e-4 relative difference, or if the number of parameters differs.
    """
    reopened = reopen_in_fresh_process(written, tokens, streamed=streamed)
    params = int(reopened["params"])
    if params != written.params:
        raise SelfCheckFailed(
            f"{written.folder} opens with {params:,} parameters, {written.params:,} were written; the run is kept"
        )
    difference = float((reopened["logits"] - expected).abs().max() / expected.abs().max())
    if not difference <= LIMIT:  # NaN fails too
        raise SelfCheckFailed(
            f"{written.folder} differs from the gated model by {difference:.2e} relative (limit {LIMIT:.0e}): "
            "do not use it; the run's checkpoints are kept, please report this"
        )
    return SelfCheck(difference, tokens.numel())


def reopen_in_fresh_process(written: WrittenCheckpoint, tokens: Tensor, *, streamed: bool = False) -> dict[str, Tensor]:
    """Open the checkpoint in a fresh process, float32; returns its `logits` and its number of `params` as tensors.

    Raises `SelfCheckFailed` if it does not open.
    """
    log.info("opening %s in a fresh process", written.folder)
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "tokens.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"tokens": tokens.contiguous()}, inputs)
        code, spill = "code" if written.needs_code else "plain", scratch if streamed else ""
        # transformers caches generated modules by folder name: a scratch cache keeps an older run's code out.
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "TOKENIZERS_PARALLELISM": "false"}
        arguments = [str(written.folder.absolute()), str(inputs), str(outputs), code, spill]
        reader = subprocess.run(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-P", "-c", READER, *arguments],
            capture_output=True, text=True, env=environment, cwd=scratch, check=False,
        )  # fmt: skip
        if reader.returncode:
            last = last_line(reader.stderr)
            raise SelfCheckFailed(f"{written.folder} does not open in a fresh process: {last}")
        return load_file(outputs)
