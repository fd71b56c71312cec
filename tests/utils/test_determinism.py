"""`deterministic`: only the block uses deterministic kernels, and all settings are restored after it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prunetune.config.recipe import BudgetConfig, RunConfig
from prunetune.errors import ConfigError, ModelError
from prunetune.pipeline import multi_size
from prunetune.pipeline import run as run_module
from prunetune.utils.determinism import CUBLAS, DETERMINISTIC_WORKSPACES, deterministic

CPU = torch.device("cpu")
# In a process of its own: what is set has to be set before CUDA multiplies matrices.
SUMS = """
import torch
from prunetune.utils.determinism import deterministic
device = torch.device("cuda")
with deterministic(True, device):
    values, places = torch.randn(10**6, device=device), torch.randint(0, 8, (10**6,), device=device)
    sums = [torch.zeros(8, device=device).scatter_add(0, places, values) for _ in range(5)]
    values.view(1000, 1000) @ values.view(1000, 1000)
assert all(torch.equal(sums[0], total) for total in sums)
assert not torch.are_deterministic_algorithms_enabled()
"""
Settings = tuple[bool, bool, bool, str | None]


def settings() -> Settings:
    """All settings that the option changes."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(CUBLAS),
    )


@pytest.mark.parametrize("workspace", [None, ":0:0", ":16:8"])
def test_deterministic_restores_settings_after_the_block(
    workspace: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    if workspace:
        monkeypatch.setenv(CUBLAS, workspace)
    before = settings()
    with deterministic(True, CPU):
        mode, warns, fills, current = settings()
        assert (mode, warns, fills) == (True, False, False)
        assert current == (workspace if workspace in DETERMINISTIC_WORKSPACES else DETERMINISTIC_WORKSPACES[0])
    assert settings() == before
    with pytest.raises(KeyError), deterministic(True, CPU):
        raise KeyError
    assert settings() == before


def test_nested_blocks_and_an_earlier_mode_are_restored() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with deterministic(True, CPU):
            with deterministic(True, CPU):
                pass
            assert settings()[:3] == (True, False, False)
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_false_changes_no_setting() -> None:
    before = settings()
    with deterministic(False, CPU):
        assert settings() == before


def test_deterministic_explains_errors_of_its_mode_and_passes_on_others() -> None:
    words = "histc_cuda does not have a deterministic implementation, but you set ..."
    with pytest.raises(ModelError, match="histc_cuda has no deterministic form"), deterministic(True, CPU):
        raise RuntimeError(words)
    with pytest.raises(ConfigError, match="used CUDA before"), deterministic(True, CPU):
        raise RuntimeError(f"it uses CuBLAS ... set an environment variable {CUBLAS}=:4096:8")
    with pytest.raises(RuntimeError, match="shapes differ"), deterministic(True, CPU):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="deterministic implementation"), deterministic(False, CPU):
        raise RuntimeError(words)


@pytest.mark.parametrize("sizes", [(0.5,), ()])
@pytest.mark.parametrize("option", [True, False])
def test_run_uses_deterministic_kernels_only_if_asked(
    sizes: tuple[float, ...], option: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def prepare(*_: object, **__: object) -> None:
        modes.append(settings()[0])
        raise ConfigError("enough")

    monkeypatch.setattr(multi_size if sizes else run_module, "prepare", prepare)
    before = settings()
    with pytest.raises(ConfigError, match="enough"):
        run_module.run(RunConfig(deterministic=option, device="cpu", budget=BudgetConfig(sizes=sizes)))
    assert modes == [option]
    assert settings() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_sums_are_reproducible() -> None:
    done = subprocess.run([sys.executable, "-c", SUMS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_value_that_is_no_bool_is_refused_in_one_line(tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    for value in ("perhaps", "1", "[true]"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"deterministic: {value}\n", encoding="utf-8")
        check_refused(say("run", recipe))
    recipe.write_text("", encoding="utf-8")
    check_refused(say("run", recipe, "--deterministic=perhaps"))


def check_refused(outcome: tuple[int, str, str]) -> None:
    """Exit code 2, and one line that names the option."""
    assert outcome[0] == 2
    assert len(outcome[2].splitlines()) == 1
    assert "deterministic" in outcome[2]
