"""Facts on the machine and the software: versions, commit, device, peak memory."""

import json
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("prunetune", "torch", "transformers", "peft", "accelerate", "safetensors")


def describe_environment(device: torch.device, dtype: torch.dtype, command: str, seed: int) -> dict[str, Any]:
    """Command, commit, versions, device, dtype and seed, for the manifest."""
    return {
        "command": command,
        "commit": installed_commit(),
        "versions": package_versions(),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "seeds": {"run": seed},
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def installed_commit() -> str:
    """The git commit that prunetune was installed from or runs in; "" where it is not known."""
    try:
        origin = json.loads(distribution("prunetune").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        origin = {}
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        return str(commit)
    root = Path(__file__).parents[3]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():  # an installed package: a repository around it is another project
        return ""
    revision = subprocess.run([git, "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603
    return revision.stdout.strip()


def device_name(device: torch.device) -> str:
    """The device's name for people: the GPU's model, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    return str(device)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this process in MB: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
