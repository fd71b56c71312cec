"""CPU threads: how many this process may use, and the lock of those that record CUDA graphs. No torch here."""

import os
import threading
from collections.abc import MutableMapping
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def limit_openmp_threads(environment: MutableMapping[str, str], cgroup_root: Path = CGROUP_ROOT) -> None:
    """Have OpenMP start no more threads than the container may use, and have them sleep while they wait for each other.

    OpenMP counts the machine's cores, and its threads spin while they wait. With more threads than may run, or beside
    another busy process, small sums on the CPU then take up to ten times as long, in a run on a GPU too. What the user
    has set stays.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    cores = usable_cores(cgroup_root)
    if cores < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(cores))


def usable_cores(cgroup_root: Path = CGROUP_ROOT) -> int:
    """Cores that this process may use, by its affinity and the container's quota (cgroup 2 or 1)."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _read_cpu_quota(cgroup_root / "cpu.max")
    quota = quota or _read_cpu_quota(cgroup_root / "cpu/cpu.cfs_quota_us", cgroup_root / "cpu/cpu.cfs_period_us")
    return max(1, min(allowed, int(quota) if quota else allowed))


def _read_cpu_quota(*files: Path) -> float:
    """Quota divided by period, read from one file or two; 0 where there is no quota."""
    try:
        words = [word for file in files for word in file.read_text(encoding="ascii").split()]
        quota, period = map(float, words)
    except (OSError, ValueError):  # "max" is no number
        return 0.0
    return quota / period if quota > 0 and period > 0 else 0.0


# Recording runs the model's Python under hooks and settings that two threads cannot use at once. Linear algebra
# (`torch.linalg`) in one thread ends another one's recording: "operation not permitted when stream is capturing".
CAPTURE_LOCK = threading.Lock()
