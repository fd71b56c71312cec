"""Seeds of everything random, and deterministic kernels: the same bits on the same machine, on a GPU too."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prunetune.errors import ConfigError, ModelError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats itself (PyTorch's note on reproducibility)


@contextmanager
def deterministic(enabled: bool, device: torch.device) -> Iterator[None]:
    """Use deterministic kernels in the block, and refuse operations that have none; restore all settings afterwards.

    Without it, GPU kernels add in the order in which threads arrive. Raises `ConfigError` if this process has used
    CUDA's matrix products before, and `ModelError` for an operation without such a kernel on this device.
    """
    if not enabled:
        yield
        return
    mode, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory, workspace = torch.utils.deterministic, os.environ.get(CUBLAS)
    fills = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    if workspace not in DETERMINISTIC_WORKSPACES:
        os.environ[CUBLAS] = DETERMINISTIC_WORKSPACES[0]
    memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        if device.type == "cuda":
            torch.mm(torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device))  # refused now, or never
        yield
    except RuntimeError as refused:
        message = str(refused)
        if CUBLAS in message:
            raise ConfigError(
                f"deterministic: this process has used CUDA before, without {CUBLAS}: set it to "
                f"{DETERMINISTIC_WORKSPACES[0]} before Python starts, or make the run in a process of its own"
            ) from refused
        if "does not have a deterministic implementation" in message:
            raise ModelError(
                f"deterministic: {message.split()[0]} has no deterministic form on this device, and this model needs "
                "it: leave deterministic out"
            ) from refused
        raise
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warns)
        memory.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        if workspace is None:
            del os.environ[CUBLAS]
        else:
            os.environ[CUBLAS] = workspace


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed, different for each purpose and step, so that no generator's state has to be saved."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
