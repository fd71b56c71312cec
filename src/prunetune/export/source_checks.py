"""Whether a model folder is whole and its parts belong together, before anything is made of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from prunetune.errors import ModelError, PlanError
from prunetune.export.checksums import CHECKSUM_FILE, verify_checksums
from prunetune.pruning.families import get_family, head_counts
from prunetune.pruning.linears import COLUMNS, stored_axis
from prunetune.pruning.units import UnitKind

if TYPE_CHECKING:
    from prunetune.export.source import ExportSource

log = logging.getLogger(__name__)


def check_source(source: ExportSource) -> None:
    """Refuse what cannot be whole: shards that are missing or torn, code that may not run, a plan of another model."""
    missing = sorted(set(_indexed(source.folder)) - {file.name for file in source.folder.glob("*.safetensors")})
    if missing:
        raise ModelError(f"{source.folder}: {missing[0]} is missing; copy the folder again, or write the model again")
    try:
        if not source.tensor_files:
            raise ModelError(f"{source.folder} holds no weights (*.safetensors); copy the folder again")
    except (SafetensorError, OSError) as torn:
        raise ModelError(f"{source.folder}: a .safetensors file is not whole ({torn}); copy the folder again") from torn
    if source.layout == "per-layer" and not source.trusts_code:
        raise ModelError(
            f"{source.folder} opens with code of its own (modeling_pruned.py): read it, then say --trust-remote-code"
        )
    get_family(source.config)  # refuses
    _check_widths(source)
    if not verify_checksums(source.folder):
        log.info("%s holds no %s, so its files are taken as they are", source.folder, CHECKSUM_FILE)


def _indexed(folder: Path) -> Iterator[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            yield from json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as broken:
            raise ModelError(f"{index} cannot be read; copy the folder again") from broken


def _check_widths(source: ExportSource) -> None:
    """The plan's widths, the configuration's and the tensors' are the same."""
    heads = head_counts(source.config)
    kept = source.plan.widths() if source.plan else {}
    if any(":" in name for name in kept):  # of blocks, layers or experts: units of it are not places of the folder
        kept = {}
    for site in source.sites:
        layer = source.layer_widths[site.layer]
        attends = site.kind is UnitKind.KV_GROUP
        units, columns = (
            (layer.kv_heads, layer.query_heads * heads.head_dim)
            if attends
            else (layer.mlp_channels, layer.mlp_channels)
        )
        if kept and kept.get(site.name) != units:
            raise PlanError(
                f"{source.folder}/plan.json keeps {kept.get(site.name, 'no')} units at {site.name} and config.json "
                f"says {units}: the plan is of another model; put back the plan.json of this one"
            )
        module = site.consumer.module if site.consumer else ""
        name, axis = f"{module}.weight", stored_axis(source.meta_model.get_submodule(module), COLUMNS)
        found = source.shape(name)[axis] if name in source.tensor_files else columns
        if found != columns:
            raise ModelError(
                f"{source.folder}: {name} has {found} columns and config.json asks for {columns}: "
                "weights and configuration do not belong together; copy them again"
            )
