"""The latency table for a model on this device: read from a file, taken from the cache, or measured now."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from prunetune.bench.latency.header import table_header, table_path
from prunetune.bench.latency.measure import LatencyTableBuilder
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.latency_table import LatencyTable
from prunetune.errors import ConfigError
from prunetune.pruning.units import Site, UnitKind
from prunetune.utils.files import expand_path, write_text
from prunetune.utils.json_lines import JsonObject

log = logging.getLogger(__name__)


def get_latency_table(
    config: Any, sites: tuple[Site, ...], workload: WorkloadConfig, device: torch.device, align: int, file: str = ""
) -> LatencyTable:
    """The table of `file`, or the one in the cache, or a new one that is measured and cached.

    Raises `ConfigError` if a file is for another device, driver, version or workload.
    """
    header = checked_header(config, sites, workload, device, align)
    if file:
        return LatencyTable.load(expand_path(file), header)
    cached = load_cached_table(header)
    return cached if cached is not None else measure_table(config, sites, workload, device, align, header)


def checked_header(
    config: Any, sites: tuple[Site, ...], workload: WorkloadConfig, device: torch.device, align: int
) -> JsonObject:
    """The header of a table for these units; raises `ConfigError` for kinds that no table prices."""
    kinds = {site.kind for site in sites}
    unmeasured = [kind.recipe_name for kind in UnitKind if kind in kinds and not kind.is_in_latency_table]
    if unmeasured:
        raise ConfigError(
            f"latency is not measured for {unmeasured[0]}: leave it out of budget.units, "
            "or budget.latency and budget.throughput out"
        )
    return table_header(config, workload, device, align) | {"blocks": UnitKind.MLP_BLOCK in kinds}


def load_cached_table(header: JsonObject) -> LatencyTable | None:
    """The table in the cache; None if there is none, or it cannot be read."""
    path = table_path(header)
    if not path.is_file():
        return None
    try:
        return LatencyTable.load(path, header)
    except ConfigError as broken:
        log.warning("%s: measured again", broken)
        return None


def measure_table(
    config: Any, sites: tuple[Site, ...], workload: WorkloadConfig, device: torch.device, align: int, header: JsonObject
) -> LatencyTable:
    """Measure a table and write it to the cache; if that fails, the table is returned all the same, with a warning."""
    zero_width, start = any(site.kind is UnitKind.MLP_BLOCK for site in sites), time.monotonic()
    table = LatencyTableBuilder(config, workload, device, align, includes_zero_width=zero_width).measure(header)
    path, seconds = table_path(header), time.monotonic() - start
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, table.to_json() + "\n")
    except OSError as broken:
        log.warning(
            "measured latency in %.0f s; not written to %s (%s): set PRUNETUNE_CACHE", seconds, path, broken.strerror
        )
    else:
        log.info("measured latency in %.0f s; the table is in %s", seconds, path)
    return table
