"""CPU cores that a container may use, by quota and affinity."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prunetune.utils.threads import limit_openmp_threads, usable_cores


def group(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


V1 = {"cpu/cpu.cfs_quota_us": "{}\n", "cpu/cpu.cfs_period_us": "100000\n"}
QUOTAS = [
    ({"cpu.max": "100000 100000\n"}, 1),
    ({"cpu.max": "350000 100000\n"}, 3),
    ({"cpu.max": "20000 100000\n"}, 1),
    ({"cpu.max": "max 100000\n"}, None),
    ({"cpu.max": "0 0\n"}, None),
    ({"cpu.max": "garbage"}, None),
    ({name: text.format(200000) for name, text in V1.items()}, 2),
    ({name: text.format(-1) for name, text in V1.items()}, None),
    ({}, None),
]


@pytest.mark.parametrize(("files", "cores"), QUOTAS)
def test_quota_bounds_the_cores(
    files: dict[str, str], cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cgroup = group(tmp_path, files)
    assert usable_cores(cgroup) == (cores or 8)
    for variables in ({}, {"OMP_NUM_THREADS": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment = dict(variables)
        limit_openmp_threads(environment, cgroup)
        limit = {"OMP_NUM_THREADS": str(cores)} if cores else {}
        assert environment == {"OMP_WAIT_POLICY": "PASSIVE", **limit, **variables}  # what the user has set stays


def test_affinity_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores(group(tmp_path, {"cpu.max": "600000 100000"})) == 2
