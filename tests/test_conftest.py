"""Laws of the tests themselves: what they write for a while is gone when they end."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def test_session_removes_its_folder_of_generated_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a hook of its end, since workers that are ended from outside run no exit handlers."""
    for variable in ("HF_MODULES_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "as before")
    spec = importlib.util.spec_from_file_location("another_session", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    session = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(session)
    folder = Path(os.environ["HF_MODULES_CACHE"])
    (folder / "generated.py").write_text("")
    session.pytest_unconfigure()
    assert not folder.exists()
