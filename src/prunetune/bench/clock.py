"""Time, peak memory and energy of a device, and the time of a batch of requests: prefill, then greedy decode steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MILLI = 1e-3
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # written to CLEAR, resets the peak of resident memory (man 5 proc)


def energy_meter(device: torch.device) -> Callable[[], float] | None:
    """A function that returns the joules used so far; None if nothing reports them.

    The counter is that of the whole card and moves every few tens of milliseconds, so short runs are coarse.
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


def synchronized_time(device: torch.device) -> float:
    """Seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def reset_peak_memory(device: torch.device) -> bool:
    """Reset the peak of memory to what is in use now; False if the device or the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu":
        return False
    try:
        CLEAR.write_text(RESET_PEAK, encoding="ascii")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def current_bytes(device: torch.device) -> int:
    """Bytes in use now, where `reset_peak_memory` works; before a model is opened, the part that is not its own."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """Peak bytes since the last successful reset: allocated on CUDA, resident in this process on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    """Bytes of one entry of this process's status file."""
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class RequestTimes:
    """Seconds of one batch of requests."""

    total: float
    prefill: float
    decode: float  # one step


def random_prompts(model: Any, batch: int, prompt: int) -> Tensor:
    """Random token ids [B, T] on the model's device, the same every time: their values do not change the time."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (batch, prompt), generator=rng)
    return tokens.to(model.device)


@torch.no_grad()
def time_request(
    model: Any, tokens: Tensor, cache: Any, new_tokens: int, decode_step: Callable[..., Any] | None = None
) -> RequestTimes:
    """Time a prefill of prompts [B, T] and the decode steps that write `new_tokens` of each.

    The first token comes from the prefill. `decode_step` is called for the steps in place of the model.
    """
    decode_step = model if decode_step is None else decode_step  # `or` fails: a compiled module has no truth value
    start = synchronized_time(tokens.device)
    out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    first_token = synchronized_time(tokens.device)
    for _ in range(new_tokens - 1):
        out = decode_step(token, past_key_values=cache, use_cache=True)
        # A recorded step overwrites its last output.
        token = out.logits[:, -1].argmax(-1, keepdim=True).clone()
    end = synchronized_time(tokens.device)
    return RequestTimes(end - start, first_token - start, (end - first_token) / (new_tokens - 1))
