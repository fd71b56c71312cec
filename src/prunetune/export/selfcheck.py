"""Open a written checkpoint in a fresh process with stock transformers, and compare its logits."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunetune.errors import SelfCheckFailed
from prunetune.export.checkpoint import WrittenCheckpoint
from prunetune.utils.failures import last_line

log = logging.getLogger(__name__)
LIMIT = 1e-4  # largest relative difference of logits, float32

# Runs without prunetune, as a user of the checkpoint would. Its imports are done before it is told what to open.
READER = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
request = json.load(sys.stdin)  # empty if the parent is gone
folder, code = request["folder"], request["code"]
# Streamed: weights stay in their files, and are read as they are needed.
options = {"device_map": {"": "disk"}, "offload_folder": "."} if request["streamed"] else {}
config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
auto = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
model = auto.from_pretrained(folder, dtype=torch.float32, trust_remote_code=code, **options).eval()
with torch.inference_mode():
    output = model(load_file("tokens.safetensors")["tokens"]).logits
tied = getattr(model, "all_tied_weights_keys", None) or {}  # tied weights that stay in files are separate tensors
params = torch.tensor(sum(p.numel() for name, p in model.named_parameters() if name not in tied))
save_file({"logits": output.contiguous(), "params": params}, "logits.safetensors")
"""


class FreshReader:
    """A process with stock transformers that opens one checkpoint: started early, it imports while others are busy.

    At the end of its `with` block the process is gone. If this process is killed, it ends by itself.
    """

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        folder = self._scratch.name
        # transformers caches generated modules by folder name: a scratch cache keeps an older run's code out.
        environment = os.environ | {"HF_MODULES_CACHE": folder, "TOKENIZERS_PARALLELISM": "false"}
        with Path(folder, "errors").open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and text
                [sys.executable, "-P", "-c", READER],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=folder,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process, self._scratch:
            self._process.kill()

    def read(self, written: WrittenCheckpoint, tokens: Tensor, *, streamed: bool = False) -> dict[str, Tensor]:
        """Open the checkpoint, float32; returns its `logits` and its number of `params` as tensors.

        Raises `SelfCheckFailed` if it does not open.
        """
        log.info("opening %s in a fresh process", written.folder)
        folder = Path(self._scratch.name)
        save_file({"tokens": tokens.contiguous()}, folder / "tokens.safetensors")
        request = {"folder": str(written.folder.absolute()), "code": written.needs_code, "streamed": streamed}
        self._process.communicate(json.dumps(request).encode())
        if self._process.returncode:
            last = last_line((folder / "errors").read_text(errors="replace"))
            raise SelfCheckFailed(f"{written.folder} does not open in a fresh process: {last}")
        return load_file(folder / "logits.safetensors")


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
    written: WrittenCheckpoint,
    tokens: Tensor,
    expected: Tensor,
    *,
    streamed: bool = False,
    reader: FreshReader | None = None,
) -> SelfCheck:
    """Open the checkpoint in a fresh process, and compare its logits with those `expected`, [B, T, V].

    `streamed`: the fresh process has one layer in memory at a time. `reader`: one that was started before.
    Raises `SelfCheckFailed` above 1e-4 relative difference, or if the number of parameters differs.
    """
    with reader or FreshReader() as own:
        reopened = own.read(written, tokens, streamed=streamed)
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
