"""Fixtures and settings of all tests: threads, the folder for generated code, and the command line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

import pytest
import torch

# Tests run in two processes, on models too small for several threads; processes that they start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Code that tests generate is imported from here, not from the user's cache. Set before transformers is imported.
MODULES = tempfile.TemporaryDirectory(prefix="prunetune-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ["PRUNETUNE_CACHE"] = os.path.join(MODULES.name, "prunetune-cache")  # answers and scores of suites


def pytest_unconfigure() -> None:
    """Remove the folder when the tests are done: a process that is ended from outside runs no exit handlers."""
    MODULES.cleanup()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line: (exit code, stdout, stderr) of these arguments."""
    from prunetune.cli import app

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # discard what was printed before
        monkeypatch.setattr("sys.argv", ["prunetune", *map(str, arguments)])
        try:
            code = app._run_app()
        except SystemExit as ended:  # cyclopts ends a successful command so
            code = int(ended.code or 0)
        return (code, *capsys.readouterr())

    return run
