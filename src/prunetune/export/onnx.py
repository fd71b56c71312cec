"""Export to ONNX: one graph of the whole model, any layout, for onnxruntime, OpenVINO and DirectML.

The graph is traced, so layers may differ in width. Batch size and length are dynamic; rows of different length are
padded on the left, as for generation. It has no key-value cache: it is for scoring, ranking and classification rather
than for long answers. Weights are in a file of their own, as a graph may hold 2 GB at most.
"""

import contextlib
import io
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import ModelError, SelfCheckFailed
from prunetune.export.checkpoint import edit_json
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.source import ExportSource
from prunetune.model.onnx_model import GRAPH_FILE
from prunetune.utils.failures import first_line
from prunetune.utils.optional import require_installed

log = logging.getLogger(__name__)
ANSI_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LIMIT = 1e-3  # largest relative difference of logits, float32
CHECKED_SHAPES = ((1, 1), (1, 17), (3, 12), (2, 33))  # batch and length; none is the shape that is traced
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(source: ExportSource, path: Path, options: ExportOptions) -> ExportResult:
    """Trace the model, write `model.onnx`, its weights and the tokenizer, and compare it in onnxruntime."""
    require_installed(*PACKAGES, extra="onnx", use="onnx export")
    model = source.load_model()
    path.mkdir()
    log.info("tracing the graph")
    program = _trace(model, source.config.vocab_size)
    program.save(str(path / GRAPH_FILE), external_data=True)
    del program
    source.tokenizer.save_pretrained(path)
    for name in ("config.json", "generation_config.json", "plan.json"):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, path / name)
    # The folder has no code: with `auto_map` a tokenizer would ask whether to run it, and with `rope_scaling` warn.
    edit_json(path / "config.json", {}, without=("auto_map", "rope_scaling"))
    return ExportResult(
        path=path,
        format=f"onnx: {type(model).__name__}",
        dtype="float32",
        params=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(file.stat().st_size for file in path.glob(f"{GRAPH_FILE}*")),
        checks=(check_onnx(model, path / GRAPH_FILE),),
    )


class _Logits(nn.Module):
    """The model as a function: ids [B, T] and mask [B, T] -> logits [B, T, V], without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _trace(model: Any, vocabulary: int) -> Any:
    """Export the model to an ONNX program; raises `ModelError` if PyTorch's exporter cannot trace it."""
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    names = ("input_ids", "attention_mask")
    ids, mask = padded_batch(2, 7, vocabulary)
    with _silence_exporter():
        try:
            return torch.onnx.export(
                _Logits(model), (ids, mask), dynamo=True, verbose=False, input_names=names, output_names=["logits"],
                dynamic_shapes=dict.fromkeys(names, dynamic),
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            cause = error.__cause__ or error
            raise ModelError(
                f"{type(model).__name__} cannot be traced for ONNX ({ANSI_COLOURS.sub('', first_line(cause))}); "
                "use the folder itself, or try --to gguf"
            ) from error


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Hide messages and warnings of PyTorch's exporter about its own code."""
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
    """Random ids and their mask, [batch, length]: every row has more padding on the left than the row before."""
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(vocabulary, (batch, length), generator=rng)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : row * length // (batch + 1)] = 0
    return ids, mask


@torch.inference_mode()
def check_onnx(model: Any, graph: Path) -> RuntimeCheck:
    """Compare graph and model in onnxruntime on several batch sizes and lengths; raises `SelfCheckFailed`.

    Logits of padding are left out. The error is the largest difference over the largest logit.
    """
    import onnxruntime

    log.info("comparing the graph with the model in onnxruntime")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    logits_of, difference, largest, same, positions = _Logits(model), 0.0, 0.0, 0, 0
    for batch, length in CHECKED_SHAPES:
        ids, mask = padded_batch(batch, length, model.config.get_text_config().vocab_size)
        expected, real = logits_of(ids, mask), mask.bool()
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        ours, theirs = torch.from_numpy(logits)[real], expected[real]
        difference = max(difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        positions += len(ours)
    error = difference / largest
    if not (error <= LIMIT and same == positions):  # NaN fails too
        raise SelfCheckFailed(
            f"{graph} differs from the model by {error:.2e} relative (limit {LIMIT:.0e}) and has the same most likely "
            f"token at {100 * same / positions:.2f}% of positions (100% needed): nothing was kept; please report this"
        )
    detail = f"logits within {error:.1e}, most likely tokens equal, {len(CHECKED_SHAPES)} shapes, padded on the left"
    return RuntimeCheck(f"onnxruntime {onnxruntime.__version__}", detail)
