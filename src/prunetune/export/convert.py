"""A run's checkpoint once more: the same layout in another dtype, or layers of different width padded to equal ones."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.export.checkpoint import WrittenCheckpoint, add_old_rope_keys, edit_json
from prunetune.export.per_layer import width_option_names
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.selfcheck import check_checkpoint, compute_logits
from prunetune.export.source import ExportSource
from prunetune.export.stock_config import build_meta_model, kv_groups_validator
from prunetune.export.stock_config import shrink_config as uniform_config
from prunetune.pruning.families import head_counts
from prunetune.pruning.linears import COLUMNS, ROWS, stored_axis
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import LinearSlice

log = logging.getLogger(__name__)
PADDABLE_OPTIONS = {"num_attention_heads", "num_key_value_heads", "skip"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def export_uniform(source: ExportSource, place: Path, options: ExportOptions) -> ExportResult:
    """A folder that a stock class opens; of layers that differ in width only with `pad`, which costs parameters."""
    dtype = DTYPES.get(options.dtype, source.dtype)
    if source.layout == "uniform":
        return _copy_checkpoint(source, place, dtype)
    target = build_meta_model(padded_config(source))
    more = sum(parameter.numel() for parameter in target.parameters()) / source.params
    if not options.pad:
        raise ModelError(
            f"{source.folder}: its layers differ in width, and no stock class builds such: run again with "
            f"--layout uniform, or export gguf or onnx, or fill up with zeros to {more:.2f} times the size with --pad"
        )
    note = f"narrower layers are filled up with zeros: {more:.2f} times the parameters of the per-layer model"
    log.info(note)
    return _write_padded(source, target, place, dtype, note)


def export_per_layer(source: ExportSource, place: Path, options: ExportOptions) -> ExportResult:
    """A folder with code of its own, for layers that differ in width."""
    if source.layout == "uniform":
        raise ModelError(f"{source.folder}: its layers are equal, so a stock class opens it: export --to uniform")
    return _copy_checkpoint(source, place, DTYPES.get(options.dtype, source.dtype))


def _copy_checkpoint(source: ExportSource, place: Path, dtype: torch.dtype) -> ExportResult:
    """File by file, so that no more than one shard is in memory."""
    model = _load_rounded(source, dtype)
    expected, params = (
        compute_logits(model, source.probe_tokens()),
        sum(weight.numel() for weight in model.parameters()),
    )
    del model
    place.mkdir()
    for file in sorted(source.folder.iterdir()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
                kept = stored.metadata()
            save_file({name: _cast(tensor, dtype) for name, tensor in tensors.items()}, place / file.name, kept)
        elif file.is_file():
            shutil.copyfile(file, place / file.name)
    edit_json(place / "config.json", {"dtype": _dtype_name(dtype)})
    return _check_export(source, place, dtype, params, expected, str(source.config_json["architectures"][0]))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def padded_config(source: ExportSource) -> Any:
    """Every layer as wide as the widest, or as the next width that the stock class takes."""
    kinds, config = {site.kind for site in source.sites}, source.config
    ratio = head_counts(config).queries_per_kv_head
    others = {name for own in source.config_json["per_layer_config"].values() for name in own} - PADDABLE_OPTIONS
    if others - {width_option_names(config)["mlp"]} or any(
        layer.query_heads != ratio * layer.kv_heads for layer in source.layer_widths
    ):
        raise ModelError(
            f"{source.folder}: only KV groups and MLP channels can be filled up with zeros, and this model lost other "
            "units, too: run again with --layout uniform, or export onnx"
        )
    groups = max(layer.kv_heads for layer in source.layer_widths)
    while "attention" in kinds and not kv_groups_validator(config)(groups):
        groups += 1  # the dense width is legal
    channels = max(layer.mlp_channels for layer in source.layer_widths)
    return uniform_config(config, groups if "attention" in kinds else None, channels if "mlp" in kinds else None)


def _write_padded(source: ExportSource, target: Any, place: Path, dtype: torch.dtype, note: str) -> ExportResult:
    expected = compute_logits(_load_rounded(source, dtype), source.probe_tokens())
    shapes = {name: tensor.shape for name, tensor in target.state_dict().items()}
    state = {name: source.tensor(name).to(dtype) for name in shapes if name in source.tensor_files}
    for site in find_sites(target):
        layer = source.layer_widths[site.layer]
        wide = layer.kv_heads if site.kind == "attention" else layer.mlp_channels
        assert site.consumer is not None  # of these two kinds
        for cut, side in (*((cut, ROWS) for cut in site.producers), (site.consumer, COLUMNS)):
            for name in (f"{cut.module}.weight", f"{cut.module}.bias"):
                if name in shapes and not (side == COLUMNS and name.endswith("bias")):
                    axis = stored_axis(target.get_submodule(cut.module), side) if name.endswith("weight") else ROWS
                    state[name] = _pad_with_zeros(state.get(name), shapes[name], cut, wide, site.units, axis).to(dtype)
        if not wide:  # what else such a block has (norms of its heads) is multiplied by nothing
            state |= {n: torch.zeros(s, dtype=dtype) for n, s in shapes.items() if n.startswith(f"{site.name}.")}
    missing, _ = target.load_state_dict(state, assign=True, strict=False)
    target.tie_weights()
    if lost := [name for name in missing if target.get_parameter(name).is_meta]:
        raise ModelError(f"{source.folder}: {lost[0]} is missing; write the model again")
    target.save_pretrained(place)
    add_old_rope_keys(place / "config.json")
    source.tokenizer.save_pretrained(place)
    params = sum(weight.numel() for weight in target.parameters())
    done = _check_export(source, place, dtype, params, expected, type(target).__name__, plain=True)
    return replace(done, notes=(note,))


def _pad_with_zeros(
    stored: Tensor | None, shape: torch.Size, cut: LinearSlice, kept: int, units: int, axis: int
) -> Tensor:
    """Zeros of `shape` with what is stored in the first `kept` of so many units, along an axis."""
    full = torch.zeros(shape, dtype=stored.dtype if stored is not None else torch.float32)
    if stored is not None:
        full.index_copy_(axis, cut.indices(range(kept), units), stored)
    return full


def _load_rounded(source: ExportSource, dtype: torch.dtype) -> Any:
    """The model in float32 with weights as the file will hold them."""
    model = source.load_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def _check_export(
    source: ExportSource,
    place: Path,
    dtype: torch.dtype,
    params: int,
    expected: Tensor,
    architecture: str,
    *,
    plain: bool = False,
) -> ExportResult:
    """Open it in a fresh process and compare; raises `SelfCheckFailed`."""
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    code = source.layout == "per-layer" and not plain
    written = WrittenCheckpoint(place, architecture, source.layout, code, params, size)
    found = check_checkpoint(written, source.probe_tokens(), expected)
    checks = (RuntimeCheck(f"transformers {transformers.__version__}", f"logits within {found.max_relative:.1e}"),)
    return ExportResult(place, architecture, _dtype_name(dtype), params, size, checks)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
