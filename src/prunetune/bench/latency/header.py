"""The header of a latency table: device, driver, versions, workload and geometry of the model it was measured for."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from prunetune.config.recipe import WorkloadConfig
from prunetune.errors import ConfigError
from prunetune.model.gguf_import import cache_folder
from prunetune.utils import environment

DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Fields of a configuration that do not change the geometry.
NON_GEOMETRY_FIELDS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


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
