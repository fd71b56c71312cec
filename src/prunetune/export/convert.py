"""Export to safetensors: the same layout in another dtype, or a per-layer model padded to layers of equal width."""

import logging
import re
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
from prunetune.export.checkpoint import (
    WrittenCheckpoint,
    add_old_rope_keys,
    edit_json,
    kv_groups_validator,
    shrink_config,
)
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.selfcheck import check_checkpoint, compute_logits
from prunetune.export.source import ExportSource
from prunetune.model.per_layer_code import build_meta_model, width_option_names
from prunetune.pruning.families import head_counts
from prunetune.pruning.linears import COLUMNS, ROWS, stored_axis
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import UnitKind

log = logging.getLogger(__name__)
PADDABLE_OPTIONS = {"num_attention_heads", "num_key_value_heads", "skip"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def export_uniform(source: ExportSource, path: Path, options: ExportOptions) -> ExportResult:
    """Write a folder that a stock class opens; layers that differ in width need `pad`, which adds parameters."""
    dtype = DTYPES.get(options.dtype, source.dtype)
    if source.layout == "uniform":
        return _copy_checkpoint(source, path, dtype)
    # Every layer as wide as the widest, or as the next width that the class accepts.
    kinds, config, layers = {site.kind for site in source.sites}, source.config, source.layer_widths
    ratio, per_layer = head_counts(config).queries_per_kv_head, source.config_json["per_layer_config"]
    changed = {name for layer in per_layer.values() for name in layer}
    if changed - PADDABLE_OPTIONS - {width_option_names(config)["mlp"]} or any(
        layer.query_heads != ratio * layer.kv_heads for layer in layers
    ):
        raise ModelError(
            f"{source.folder}: only KV groups and MLP channels can be padded with zeros, and this model lost other "
            "units, too: run again with --layout uniform, or export onnx"
        )
    kv_groups = max(layer.kv_heads for layer in layers)
    while UnitKind.KV_GROUP in kinds and not kv_groups_validator(config)(kv_groups):
        kv_groups += 1  # ends at the dense width, which is valid
    channels = max(layer.mlp_channels for layer in layers) or None  # without any MLP: as before
    widths = (kv_groups if UnitKind.KV_GROUP in kinds else None, channels if UnitKind.MLP_CHANNEL in kinds else None)
    padded = build_meta_model(shrink_config(config, *widths))
    params = sum(weight.numel() for weight in padded.parameters())
    factor = params / source.params
    if not options.pad:
        raise ModelError(
            f"{source.folder}: its layers differ in width, which no stock class supports: run again with "
            f"--layout uniform, or export gguf or onnx, or pad with zeros to {factor:.2f} times the size with --pad"
        )
    note = f"narrower layers are padded with zeros: {factor:.2f} times the parameters of the per-layer model"
    log.info(note)
    # The padded model has no weights yet: it gets the stored ones and zeros.
    expected = compute_logits(_load_rounded(source, dtype), source.probe_tokens())
    shapes = {name: tensor.shape for name, tensor in padded.state_dict().items()}
    state = {name: source.tensor(name).to(dtype) for name in shapes if name in source.tensor_files}
    for site in find_sites(padded):
        layer = layers[site.layer]
        kept = layer.kv_heads if site.kind is UnitKind.KV_GROUP else layer.mlp_channels
        assert site.consumer is not None  # sites of these two kinds have one
        for linear, side in (*((linear, ROWS) for linear in site.producers), (site.consumer, COLUMNS)):
            for name in (f"{linear.module}.weight", f"{linear.module}.bias"):
                if name in state and not (side == COLUMNS and name.endswith("bias")):
                    axis = stored_axis(padded.get_submodule(linear.module), side) if name.endswith("weight") else ROWS
                    full = torch.zeros(shapes[name], dtype=dtype)  # but for the first units
                    state[name] = full.index_copy_(axis, linear.indices(range(kept), site.units), state[name])
    losers = "|".join(str(int(number)) for number, own in per_layer.items() if own.get("skip"))
    for name in shapes.keys() - state.keys():
        if losers and re.search(rf"\.({losers})\.", name):  # of a removed block, which stores nothing: it adds zeros
            state[name] = torch.zeros(shapes[name], dtype=dtype)
    missing, _ = padded.load_state_dict(state, assign=True, strict=False)
    padded.tie_weights()
    if without_weights := [name for name in missing if padded.get_parameter(name).is_meta]:
        raise ModelError(f"{source.folder}: {without_weights[0]} is missing; write the model again")
    padded.save_pretrained(path)
    add_old_rope_keys(path / "config.json")
    source.tokenizer.save_pretrained(path)
    result = _check_export(source, path, dtype, params, expected, type(padded).__name__, padded=True)
    return replace(result, notes=(note,))


def export_per_layer(source: ExportSource, path: Path, options: ExportOptions) -> ExportResult:
    """Write a folder with generated code, for layers that differ in width."""
    if source.layout == "uniform":
        raise ModelError(f"{source.folder}: its layers are equal, so a stock class opens it: export --to uniform")
    return _copy_checkpoint(source, path, DTYPES.get(options.dtype, source.dtype))


def _copy_checkpoint(source: ExportSource, path: Path, dtype: torch.dtype) -> ExportResult:
    """Copy the folder file by file, so that at most one shard is in memory, with weights in `dtype`."""
    model = _load_rounded(source, dtype)
    expected = compute_logits(model, source.probe_tokens())
    params = sum(weight.numel() for weight in model.parameters())
    del model
    path.mkdir()
    for file in sorted(source.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
            metadata = shard.metadata()
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        save_file(tensors, path / file.name, metadata)
    for index in source.folder.glob("*.safetensors.index.json"):
        shutil.copyfile(index, path / index.name)
    source.copy_other_files(path)
    edit_json(path / "config.json", {"dtype": _dtype_name(dtype)})
    return _check_export(source, path, dtype, params, expected, str(source.config_json["architectures"][0]))


def _load_rounded(source: ExportSource, dtype: torch.dtype) -> Any:
    """The model in float32, with weights rounded to `dtype` as the file will hold them."""
    model = source.load_model()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def _check_export(
    source: ExportSource,
    path: Path,
    dtype: torch.dtype,
    params: int,
    expected: Tensor,
    architecture: str,
    *,
    padded: bool = False,
) -> ExportResult:
    """Open the export in a fresh process and compare its logits; raises `SelfCheckFailed`."""
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    needs_code = source.layout == "per-layer" and not padded
    written = WrittenCheckpoint(path, architecture, source.layout, needs_code, params, size)
    comparison = check_checkpoint(written, source.probe_tokens(), expected)
    check = RuntimeCheck(f"transformers {transformers.__version__}", f"logits within {comparison.max_relative:.1e}")
    return ExportResult(path, architecture, _dtype_name(dtype), params, size, (check,))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
