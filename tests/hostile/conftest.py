"""The folder in which a hostile file is written and opened."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.data import subwords
from support.export import run_folder
from support.hostile import Place
from support.suites import model_folder


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and a per-layer run folder, which artefacts copy and change."""
    folder = tmp_path_factory.mktemp("templates")
    model_folder(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    run_folder(folder / "run", subwords())
    return folder


@pytest.fixture
def place(tmp_path: Path, templates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    def asked(*_: Any) -> str:
        raise AssertionError("a question at the terminal whether to run code")

    def index(include_path: str = "", **_: Any) -> SimpleNamespace:
        """As lm-eval's index: code beside the task files of an included folder may run. Its own takes long to read."""
        if include_path:
            exec((Path(include_path) / "evilutils.py").read_text())
        return SimpleNamespace(all_tasks=["arc_easy"])

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=index))
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.syspath_prepend(str(tmp_path / "place"))  # what an artefact names could be imported
    yield Place(tmp_path / "place", templates)
    for name in [name for name in sys.modules if name.startswith("evil")]:
        del sys.modules[name]
