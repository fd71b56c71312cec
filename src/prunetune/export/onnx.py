"""ONNX: one graph of the whole model, any layout, for onnxruntime and what reads its files (OpenVINO, DirectML).

The graph is traced, so widths that differ by layer need nothing special. Batch size and length are free; rows of
different length are padded on the left, as for generation. It holds no key-value cache: it scores, ranks and fills in
rather than generating long answers. Weights stand beside the graph, which may hold 2 GB at most.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import MissingPackage, ModelError, SelfCheckFailed
from prunetune.export.checkpoint import edit_json
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.source import ExportSource

GRAPH = "model.onnx"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal
LIMIT = 1e-3  # largest relative difference of logits, float32
SHAPES = ((1, 1), (1, 17), (3, 12), (2, 33))  # batch and length of what is compared, none of them the traced one
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(source: ExportSource, place: Path, options: ExportOptions) -> ExportResult:
    """Trace, write `model.onnx` and its weights with the tokenizer, run it in onnxruntime and compare."""
    if missing := missing_packages():
        raise MissingPackage(f"onnx export needs {', '.join(missing)}; run: pip install 'prunetune[onnx]'")
    model = source.load_model()
    place.mkdir()
    program = _traced(model, source.config.vocab_size)
    program.save(str(place / GRAPH), external_data=True)
    del program
    source.tokenizer.save_pretrained(place)
    for name in ("config.json", "generation_config.json", "plan.json"):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, place / name)
    # No code stands here: a tokenizer would ask whether to run it, and note an old key of a class that it knows not.
    edit_json(place / "config.json", {}, without=("auto_map", "rope_scaling"))
    params = sum(parameter.numel() for parameter in model.parameters())
    size = sum(file.stat().st_size for file in place.glob(f"{GRAPH}*"))
    return ExportResult(
        place, f"onnx: {type(model).__name__}", "float32", params, size, (check_onnx(model, place / GRAPH),)
    )


def missing_packages() -> list[str]:
    """What `prunetune[onnx]` would install and is not there."""
    return [name for name in PACKAGES if find_spec(name) is None]


class _Logits(nn.Module):
    """ids [B, T] and mask [B, T] -> logits [B, T, V], with no cache among inputs or outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _traced(model: Any, vocabulary: int) -> Any:
    """The ONNX program; raises `ModelError` where the exporter cannot follow the architecture."""
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    names = ("input_ids", "attention_mask")
    ids, mask = padded_batch(2, 7, vocabulary)
    with _quiet():
        try:
            return torch.onnx.export(
                _Logits(model), (ids, mask), dynamo=True, verbose=False, input_names=names, output_names=["logits"],
                dynamic_shapes=dict.fromkeys(names, free),
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as failed:
            cause = failed.__cause__ or failed
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise ModelError(
                f"{type(model).__name__} cannot be traced for ONNX ({COLOURS.sub('', reason)}); "
                "use the folder itself, or see whether llama.cpp knows it with --to gguf"
            ) from failed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporter says of its own code; none of it is about the model."""
    log, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    log.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: ", UserWarning)  # both inputs share their axes
            yield
    finally:
        log.setLevel(level)


def padded_batch(batch: int, length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """[batch, length] ids and their mask: from the second row on padded on the left, each row more than the last."""
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(vocabulary, (batch, length), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row * length // (batch + 1)] = 0
    return ids, mask


@dataclass(frozen=True)
class LogitAgreement:
    """Over all real tokens compared."""

    max_relative_error: float  # largest difference of logits over the largest logit
    same_token_share: float  # share of tokens whose most likely successor is the same


def check_onnx(model: Any, graph: Path) -> RuntimeCheck:
    """Run the file in onnxruntime on several batch sizes and lengths; raises `SelfCheckFailed` on a difference."""
    import onnxruntime

    found = compare_logits(model, graph)
    if not (found.max_relative_error <= LIMIT and found.same_token_share == 1):  # NaN fails too
        raise SelfCheckFailed(
            f"{graph} differs from the model by {found.max_relative_error:.2e} relative (limit {LIMIT:.0e}) and has the same "
            f"most likely token in {100 * found.same_token_share:.2f}% of places (100% asked): nothing was kept; please report this"
        )
    said = f"logits within {found.max_relative_error:.1e}, most likely tokens equal, {len(SHAPES)} shapes, padded on the left"
    return RuntimeCheck(f"onnxruntime {onnxruntime.__version__}", said)


@torch.inference_mode()
def compare_logits(model: Any, graph: Path) -> LogitAgreement:
    """The file beside the model, on real tokens."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    wrapped, difference, largest, same, places = _Logits(model), 0.0, 0.0, 0, 0
    for batch, length in SHAPES:
        ids, mask = padded_batch(batch, length, model.config.get_text_config().vocab_size)
        expected, real = wrapped(ids, mask), mask.bool()
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        ours, theirs = torch.from_numpy(logits)[real], expected[real]
        difference = max(difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        places += len(ours)
    return LogitAgreement(difference / largest, same / places)
