"""Checks of a model folder before it is exported: no file is missing or damaged, and its parts belong together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from prunetune.errors import ModelError, PlanError
from prunetune.model.checksums import CHECKSUM_FILE, verify_checksums
from prunetune.model.safetensors_reader import safetensors_files
from prunetune.pruning.families import get_family, head_counts
from prunetune.pruning.linears import COLUMNS, stored_axis
from prunetune.pruning.units import UnitKind

if TYPE_CHECKING:
    from prunetune.export.source import ExportSource

log = logging.getLogger(__name__)


def check_source(source: ExportSource) -> None:
    """Check files, architecture, widths and checksums, in this order.

    Raises `ModelError` or, for a plan of another model, `PlanError`.
    """
    if missing := [file.name for file in safetensors_files(source.folder) if not file.is_file()]:
        raise ModelError(f"{source.folder}: {missing[0]} is missing; copy the folder again, or write the model again")
    try:
        if not source.tensor_files:
            raise ModelError(f"{source.folder} holds no weights (*.safetensors); copy the folder again")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{source.folder}: a .safetensors file is not whole ({error}); copy the folder again"
        ) from error
    if (source.folder / "adapter_config.json").exists():  # which names a folder or hub model to open instead
        raise ModelError(f"{source.folder} holds an adapter, and export needs whole weights: merge it into its model")
    get_family(source.config)  # raises for an unknown architecture
    _check_widths(source)
    if not verify_checksums(source.folder):
        log.info("%s has no %s: its files are not verified", source.folder, CHECKSUM_FILE)


def _check_widths(source: ExportSource) -> None:
    """Check that plan.json, config.json and the tensors have the same widths."""
    heads = head_counts(source.config)
    plan_widths = source.plan.widths() if source.plan else {}
    if any(":" in name for name in plan_widths):  # of blocks, layers or experts, which `source.sites` does not have
        plan_widths = {}
    is_of_another_model = bool(plan_widths) and not any(site.name in plan_widths for site in source.sites)
    for site in source.sites:
        layer = source.layer_widths[site.layer]
        if site.kind is UnitKind.KV_GROUP:
            units, columns = layer.kv_heads, layer.query_heads * heads.head_dim
        else:
            units = columns = layer.mlp_channels
        # A run that prunes other kinds, or a model that has lost this block before, has no such site.
        if plan_widths.get(site.name, units) != units or is_of_another_model:
            raise PlanError(
                f"{source.folder}/plan.json keeps {plan_widths.get(site.name, 'no')} units at {site.name} and "
                f"config.json says {units}: the plan is of another model; put back the plan.json of this one"
            )
        module = site.consumer.module if site.consumer else ""
        name, axis = f"{module}.weight", stored_axis(source.meta_model.get_submodule(module), COLUMNS)
        stored_columns = source.shape(name)[axis] if name in source.tensor_files else columns
        if stored_columns != columns:
            raise ModelError(
                f"{source.folder}: {name} has {stored_columns} columns and config.json asks for {columns}: "
                "weights and configuration do not belong together; copy them again"
            )
