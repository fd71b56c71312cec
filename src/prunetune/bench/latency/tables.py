"""The table of this device: the one that is named, the one in the cache, or one that is measured now."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch

from prunetune.bench.latency.header import header_of, place_of
from prunetune.bench.latency.measure import POINTS, Meter
from prunetune.bench.latency.request_timing import RUNS
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.latency_table import Table
from prunetune.errors import ConfigError
from prunetune.pruning.units import KINDS, Site
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)
KNOWN = ("attention", "mlp", "attention-blocks", "mlp-blocks", "layers")  # kinds of unit that a table can price


def table_for(
    config: Any, sites: tuple[Site, ...], workload: WorkloadConfig, device: torch.device, align: int, given: str = ""
) -> Table:
    """Raises `ConfigError` where a file is about another device, driver, version or workload."""
    header = checked_header(config, sites, workload, device, align)
    if given:
        return Table.load(Path(given), header)
    found = in_cache(header)
    return found if found is not None else measured(config, sites, workload, device, align, header)


def checked_header(
    config: Any, sites: tuple[Site, ...], workload: WorkloadConfig, device: torch.device, align: int
) -> dict[str, Any]:
    """The header of a table for these units; raises `ConfigError` for kinds that no table prices."""
    odd = [name for name, kind in KINDS.items() if kind not in KNOWN and any(site.kind == kind for site in sites)]
    if odd:
        raise ConfigError(
            f"latency is not measured for {odd[0]}: leave it out of budget.units, "
            "or budget.latency and budget.throughput out"
        )
    return header_of(config, workload, device, align) | {"blocks": any(site.kind == "mlp-blocks" for site in sites)}


def in_cache(header: dict[str, Any]) -> Table | None:
    """The table that was measured before; None where there is none, or it cannot be read."""
    place = place_of(header)
    if not place.is_file():
        return None
    try:
        return Table.load(place, header)
    except ConfigError as broken:
        log.warning("%s: measured again", broken)
        return None


def measured(
    config: Any,
    sites: tuple[Site, ...],
    workload: WorkloadConfig,
    device: torch.device,
    align: int,
    header: dict[str, Any],
    *,
    points: int = POINTS,
    runs: int = RUNS,
) -> Table:
    """Measure now, and keep it in the cache; where that cannot be written, the minutes that it took are not lost."""
    whole = any(site.kind == "mlp-blocks" for site in sites)
    begun = time.monotonic()
    table = Meter(config, workload, device, align, points, runs, whole).table(header)
    place, seconds = place_of(header), time.monotonic() - begun
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, table.to_json() + "\n")
    except OSError as broken:
        log.warning(
            "measured latency in %.0f s; not kept in %s (%s): set PRUNETUNE_CACHE", seconds, place, broken.strerror
        )
    else:
        log.info("measured latency in %.0f s; the table is kept in %s", seconds, place)
    return table
