"""Weight-only quantisation of a finished model, saved so that stock transformers opens it: int8 and int4.

int8 is torchao's, a scale a row, for any width. int4 is bitsandbytes' nf4, which asks for rows of whole blocks of 64
weights: a linear whose input is no multiple of 64 would be wrong or fail, so it stays as it is, and that is said before
anything is loaded. (torchao's own int4 needs kernels that come apart from it, and cannot be written without them.)
Embeddings and the head stay as they are. The error against the model before is stated, and a large one refused.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import MissingPackage, ModelError, SelfCheckFailed
from prunetune.export.checkpoint import WrittenCheckpoint, edit_json
from prunetune.export.result import ExportResult, RuntimeCheck
from prunetune.export.selfcheck import compute_logits, reopen_in_fresh_process
from prunetune.export.source import ExportSource
from prunetune.export.stock_config import build_meta_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationScheme:
    """One way to hold a weight in fewer bits."""

    package: str
    bits: float  # a weight, scales included
    block_size: int  # a row's weights have to be a multiple of this
    max_error: float  # largest relative error of logits (root mean square) that is kept
    make_config: Callable[
        [list[str], Any], Any
    ]  # modules left as they are, dtype of the arithmetic -> transformers' config


def _int8(left: list[str], _: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=left)


def _nf4(left: list[str], dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=left
    )


SCHEMES: Mapping[str, QuantizationScheme] = {
    "int8": QuantizationScheme("torchao", 8, 1, 0.05, _int8),
    "int4": QuantizationScheme("bitsandbytes", 4.5, 64, 0.4, _nf4),
}


@dataclass(frozen=True)
class QuantizableLinears:
    """Which linears a scheme can hold."""

    quantized: tuple[str, ...]
    skipped: Mapping[str, int]  # name -> weights in a row, of those that stay as they are

    def explain_skipped(self, scheme: QuantizationScheme) -> str:
        """What stays as it is, why, and what would do; "" where all fit."""
        if not self.skipped:
            return ""
        name, width = next(iter(self.skipped.items()))
        return (
            f"{len(self.skipped)} of {len(self.skipped) + len(self.quantized)} linears stay unquantised: their rows are no "
            f"multiple of {scheme.block_size} ({name}: {width}); prune with --budget.align {scheme.block_size}, or take int8"
        )


def find_quantizable(source: ExportSource, scheme: QuantizationScheme) -> QuantizableLinears:
    """Go by the stored shapes; no weight is read."""
    model = build_meta_model(source.config)
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    rows = {name: source.shape(f"{name}.weight")[1] for name in names if f"{name}.weight" in source.tensor_files}
    left = {name: width for name, width in rows.items() if width % scheme.block_size}
    return QuantizableLinears(tuple(name for name in rows if name not in left), left)


def export_quantized(source: ExportSource, place: Path, kind: str) -> ExportResult:
    """Quantise, write, open in a fresh process, and compare with the model before; refuses first what cannot be."""
    scheme = SCHEMES[kind]
    fitting = find_quantizable(source, scheme)
    if not fitting.quantized:
        raise ModelError(f"{source.folder}: no linear can be held in {kind}: {fitting.explain_skipped(scheme)}")
    if note := fitting.explain_skipped(scheme):
        log.warning("%s: %s", kind, note)
    if find_spec(scheme.package) is None:
        raise MissingPackage(f"{kind} needs {scheme.package}; run: pip install 'prunetune[quant]'")
    expected = compute_logits(source.load_model(), source.probe_tokens())
    rounding = 0.0
    if source.dtype != torch.float32:  # torchao's tensors compute in the dtype that they are stored in
        rounding = _error(compute_logits(source.load_model(source.dtype), source.probe_tokens()), expected)
    place.mkdir()
    _write(source, place, scheme, fitting)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    checks = (_check_quantized(source, place, scheme, expected, rounding),)
    notes = (f"opens where {scheme.package} is installed", *filter(None, (note,)))
    return ExportResult(
        place,
        str(source.config_json["architectures"][0]),
        f"{kind} ({scheme.package})",
        source.params,
        size,
        checks,
        notes,
    )


def _write(source: ExportSource, place: Path, scheme: QuantizationScheme, fitting: QuantizableLinears) -> None:
    config = scheme.make_config([*_head(source), *fitting.skipped], source.dtype)
    model = source.load_model(source.dtype, quantization_config=config)
    # Names as in memory, as per-layer folders have them; a stock class renames by itself.
    model.save_pretrained(place, save_original_format=source.layout == "uniform")
    said = model.config.quantization_config
    for file in sorted(source.folder.iterdir()):
        if file.is_file() and file.suffix not in (".safetensors", ".index.json") and not (place / file.name).exists():
            shutil.copyfile(file, place / file.name)
    edit_json(place / "config.json", {"quantization_config": said if isinstance(said, dict) else said.to_dict()})


def _head(source: ExportSource) -> list[str]:
    """The head, which transformers would leave out by itself were no other named."""
    model = build_meta_model(source.config)
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative, root mean square."""
    return float((found - expected).norm() / expected.norm())


def _check_quantized(
    source: ExportSource, place: Path, scheme: QuantizationScheme, expected: Tensor, rounding: float
) -> RuntimeCheck:
    """Open it as its user would; raises `SelfCheckFailed` where it is far from the model before."""
    written = WrittenCheckpoint(place, "", source.layout, source.layout == "per-layer", 0, 0)
    found = reopen_in_fresh_process(written, source.probe_tokens())["logits"]
    error = _error(found, expected)
    same = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    said = f"{100 * error:.2f}% root mean square error of logits, {100 * same:.0f}% of most likely tokens equal"
    if rounding:
        said += f" ({100 * rounding:.2f}% without quantising, by arithmetic in {str(source.dtype)[6:]} alone)"
    limit = scheme.max_error + rounding
    if not error <= limit:  # NaN fails too
        raise SelfCheckFailed(f"{place}: {said} against the unquantised model (limit {100 * limit:.0f}%)")
    return RuntimeCheck(f"transformers {version('transformers')}, {scheme.package} {version(scheme.package)}", said)
