"""Energy of an NVIDIA GPU, where it keeps a counter and the package nvidia-ml-py reads it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch

MILLI = 1e-3


def meter(device: torch.device) -> Callable[[], float] | None:
    """A reader of the joules used so far; None where nothing reports them.

    The counter is the whole card's and moves every few tens of milliseconds, so short runs are coarse.
    """
    if device.type != "cuda":
        return None
    try:
        nvml = import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(card)  # cards before Volta have none
    except nvml.NVMLError:
        return None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(card)) * MILLI
