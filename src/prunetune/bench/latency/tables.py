"""The latency table for a model on this device: read from a file, taken from the cache, or measured now.

Its header has all that the times depend on: device, driver, versions, workload and geometry of the model.
"""

import hashlib
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import torch

from prunetune.bench.latency.measure import LatencyTableBuilder
from prunetune.config.recipe import WorkloadConfig
from prunetune.cost.latency_table import LatencyTable
from prunetune.errors import ConfigError, RunFolderError
from prunetune.model.gguf_import import cache_folder
from prunetune.pruning.units import Site, UnitKind
from prunetune.utils import environment
from prunetune.utils.files import expand_path, write_text
from prunetune.utils.json_lines import JsonObject
from prunetune.utils.untrusted import read_text

log = logging.getLogger(__name__)
KEPT_REMEDY = "put it back, or start anew with another --out"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Fields of a configuration that do not change the geometry.
NON_GEOMETRY_FIELDS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
ATTEMPTS = 2  # at a table, on a machine that is so busy that differences of times are negative


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


def load_kept_table(path: Path, header: JsonObject) -> LatencyTable:
    """The table that a run was begun with, whatever this device is; raises `RunFolderError` without a sound file."""
    try:
        table = LatencyTable.from_json(read_text(path), str(path), KEPT_REMEDY)
    except (OSError, ValueError) as missing:
        raise RunFolderError(f"{path} cannot be read ({missing}): {KEPT_REMEDY}") from missing
    except ConfigError as damaged:
        raise RunFolderError(str(damaged)) from damaged
    if difference := table.difference_from(header):
        log.warning("%s was measured with %s: the run keeps its limits", path, difference)
    return table


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
    """Measure a table and write it to the cache; if that fails, the table is returned all the same, with a warning.

    Raises `ConfigError` where the machine is too busy to be timed.
    """
    zero_width, start = any(site.kind is UnitKind.MLP_BLOCK for site in sites), time.monotonic()
    builder = LatencyTableBuilder(config, workload, device, align, includes_zero_width=zero_width)
    for _ in range(ATTEMPTS):
        table = builder.measure(header)
        if not table.impossible_time:
            break
        log.warning("measured %s, which cannot be: other processes keep the machine busy", table.impossible_time)
    else:
        raise ConfigError(
            f"latency cannot be measured while the machine is busy (measured {table.impossible_time}): quiet it and "
            "start again, or name a budget that is counted, such as budget.flops"
        )
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


def table_header(config: Any, workload: WorkloadConfig, device: torch.device, align: int) -> dict[str, Any]:
    """All that measured times depend on, as plain values; raises `ConfigError` for a workload that cannot be timed."""
    if workload.weights != "plain":
        raise ConfigError(
            f"workload.weights {workload.weights}: latency is measured with plain weights; set it to plain, "
            "or leave budget.latency and budget.throughput out"
        )
    if workload.runtime == "recorded" and device.type != "cuda":
        raise ConfigError(f"workload.runtime recorded needs a CUDA device, and this is {device}: set it to eager")
    versions, values = environment.package_versions(), config.to_dict()
    return {
        "device": environment.device_name(device),
        "driver": driver(device),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "runtime": workload.runtime,
        "dtype": workload.dtype,
        "prompt": workload.prompt,
        "generate": workload.generate,
        "batch": workload.batch,
        "align": align,
        "model": config.model_type,
        "geometry": _digest({name: value for name, value in values.items() if name not in NON_GEOMETRY_FIELDS}),
    }


def driver(device: torch.device) -> str:
    """Version of the NVIDIA driver; "" on other devices than CUDA."""
    if device.type != "cuda":
        return ""
    try:
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER_FILE.read_text(encoding="ascii", errors="replace"))
    except OSError:
        match = None
    return match.group() if match else f"CUDA {torch.version.cuda}"


def table_path(header: dict[str, Any]) -> Path:
    """The file of the cache for a table with this header."""
    return cache_folder() / "latency" / f"{header['model']}-{_digest(header)}.json"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
