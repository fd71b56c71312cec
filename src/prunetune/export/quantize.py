"""Weight-only quantisation of a finished model to int8 or int4, saved so that stock transformers opens it.

int8 is torchao's, with a scale for each row, for any width. int4 is bitsandbytes' nf4, which needs rows of whole blocks
of 64 weights: a linear whose input is no multiple of 64 would be wrong or fail, so it is not quantised, with a warning
before anything is loaded. (torchao's own int4 needs separate kernels, and cannot be saved without them.)
Embeddings and the head are not quantised. The error against the unquantised model is reported, and a large one refused.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import ModelError, SelfCheckFailed
from prunetune.export.checkpoint import WrittenCheckpoint, edit_json
from prunetune.export.result import ExportResult, RuntimeCheck
from prunetune.export.selfcheck import FreshReader, compute_logits
from prunetune.export.source import ExportSource
from prunetune.model.per_layer_code import build_meta_model
from prunetune.pruning.linears import ROWS
from prunetune.pruning.nf4 import round_to_nf4
from prunetune.utils.optional import require_installed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizationScheme:
    """One way to store a weight in fewer bits."""

    package: str
    bits: float  # per weight, scales included
    block_size: int  # the weights in a row must be a multiple of this
    max_error: float  # largest relative error of logits (root mean square) that is accepted
    # Modules that are not quantised, dtype of the arithmetic -> transformers' configuration.
    make_config: Callable[[list[str], Any], Any]
    round_weight: Callable[[nn.Linear], tuple[Tensor, int]]  # its values once stored, [out, in], and their bytes


def _int8(skipped: list[str], _: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=skipped)


def _nf4(skipped: list[str], dtype: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
    )


def _round_to_int8(linear: nn.Linear) -> tuple[Tensor, int]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    stored: Any = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    stored.weight = linear.weight
    quantize_(stored, Int8WeightOnlyConfig(version=2))
    return stored.weight.dequantize(), linear.weight.numel() + 4 * linear.out_features


def _round_to_nf4(linear: nn.Linear) -> tuple[Tensor, int]:
    weight = linear.weight
    values = round_to_nf4(linear, weight, cut_axis=ROWS, dtype=weight.dtype, device=weight.device)
    return values, weight.numel() * 9 // 16


SCHEMES: Mapping[str, QuantizationScheme] = {
    "int8": QuantizationScheme("torchao", 8, 1, 0.05, _int8, _round_to_int8),
    "int4": QuantizationScheme("bitsandbytes", 4.5, 64, 0.4, _nf4, _round_to_nf4),
}


@dataclass(frozen=True)
class QuantizableLinears:
    """The linears that a scheme can quantise, and those that it cannot."""

    quantized: tuple[str, ...]
    skipped: Mapping[str, int]  # name -> weights in a row

    def explain_skipped(self, scheme: QuantizationScheme) -> str:
        """How many linears are not quantised, why, and what to do; "" if all are."""
        if not self.skipped:
            return ""
        name, width = next(iter(self.skipped.items()))
        linears, block = len(self.skipped) + len(self.quantized), scheme.block_size
        return (
            f"{len(self.skipped)} of {linears} linears stay unquantised: their rows are no multiple of {block} "
            f"({name}: {width}); prune with --budget.align {block}, or take int8"
        )


def find_quantizable(source: ExportSource, scheme: QuantizationScheme) -> QuantizableLinears:
    """Sort the linears by their stored shapes; no weight is read."""
    names = linears_but_head(build_meta_model(source.config))
    widths = {name: source.shape(f"{name}.weight")[1] for name in names if f"{name}.weight" in source.tensor_files}
    skipped = {name: width for name, width in widths.items() if width % scheme.block_size}
    return QuantizableLinears(tuple(name for name in widths if name not in skipped), skipped)


def linears_but_head(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of a model by name, without its output head."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


@torch.no_grad()
def rounded_as_quantized(model: Any, kind: str) -> tuple[Any, int]:
    """A copy whose linears hold the values that an export quantised to `kind` would, and the bytes of its tensors.

    The arithmetic is that of ordinary linears, so its scores are the export's but for the order of rounding.
    """
    scheme, rounded = SCHEMES[kind], copy.deepcopy(model)
    size = sum(weight.nbytes for weight in rounded.parameters())
    for linear in linears_but_head(rounded).values():
        if linear.in_features % scheme.block_size == 0:
            values, stored_bytes = scheme.round_weight(linear)
            size += stored_bytes - linear.weight.nbytes
            linear.weight.copy_(values)
    return rounded, size


def require_scheme(kind: str) -> None:
    """Raises `MissingPackage` where the package that quantises to `kind` is not installed."""
    require_installed(SCHEMES[kind].package, extra="quant", use=kind)


def export_quantized(source: ExportSource, path: Path, kind: str) -> ExportResult:
    """Quantise and write the model, open it in a fresh process, and compare it with the unquantised one.

    Raises `ModelError` or `MissingPackage` before anything is loaded, `SelfCheckFailed` for a large error.
    """
    scheme = SCHEMES[kind]
    linears = find_quantizable(source, scheme)
    skipped_note = linears.explain_skipped(scheme)
    if not linears.quantized:
        raise ModelError(f"{source.folder}: no linear can be quantised to {kind}: {skipped_note}")
    if skipped_note:
        log.warning("%s: %s", kind, skipped_note)
    require_scheme(kind)
    expected = compute_logits(source.load_model(), source.probe_tokens())
    rounding_error = 0.0
    if source.dtype != torch.float32:  # torchao's tensors compute in the dtype that they are stored in
        rounded = compute_logits(source.load_model(source.dtype), source.probe_tokens())
        rounding_error = _relative_error(rounded, expected)
    path.mkdir()
    _write(source, path, scheme, linears)
    return ExportResult(
        path=path,
        format=str(source.config_json["architectures"][0]),
        dtype=f"{kind} ({scheme.package})",
        params=source.params,
        bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
        checks=(_check_quantized(source, path, scheme, expected, rounding_error),),
        notes=(f"opens where {scheme.package} is installed", *filter(None, (skipped_note,))),
    )


def _write(source: ExportSource, path: Path, scheme: QuantizationScheme, linears: QuantizableLinears) -> None:
    meta_model = build_meta_model(source.config)
    # transformers skips the head by itself only if no other module is named.
    head = [name for name, module in meta_model.named_modules() if module is meta_model.get_output_embeddings()]
    config = scheme.make_config([*head, *linears.skipped], source.dtype)
    model = source.load_model(source.dtype, quantization_config=config)
    # Tensor names as in memory, as per-layer folders have them; a stock class renames by itself.
    model.save_pretrained(path, save_original_format=source.layout == "uniform")
    source.copy_other_files(path)
    saved = model.config.quantization_config
    edit_json(path / "config.json", {"quantization_config": saved if isinstance(saved, dict) else saved.to_dict()})


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    """The root mean square error as a share of the expected logits' root mean square."""
    return float((logits - expected).norm() / expected.norm())


def _check_quantized(
    source: ExportSource, path: Path, scheme: QuantizationScheme, expected: Tensor, rounding_error: float
) -> RuntimeCheck:
    """Open the model in a fresh process; raises `SelfCheckFailed` if its logits are far from those `expected`."""
    written = WrittenCheckpoint(path, "", source.layout, source.layout == "per-layer", 0, 0)
    with FreshReader() as reader:
        logits = reader.read(written, source.probe_tokens())["logits"]
    error = _relative_error(logits, expected)
    same = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    detail = f"{100 * error:.2f}% root mean square error of logits, {100 * same:.0f}% of most likely tokens equal"
    if rounding_error:
        dtype = str(source.dtype).removeprefix("torch.")
        detail += f" ({100 * rounding_error:.2f}% without quantising, by arithmetic in {dtype} alone)"
    limit = scheme.max_error + rounding_error
    if not error <= limit:  # NaN fails too
        raise SelfCheckFailed(f"{path}: {detail} against the unquantised model (limit {100 * limit:.0f}%)")
    return RuntimeCheck(f"transformers {version('transformers')}, {scheme.package} {version(scheme.package)}", detail)
