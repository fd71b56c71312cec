"""Progress in a notebook: what is shown, how it is updated and escaped."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("IPython")

from IPython import display as ipython_display

from prunetune.utils.notebook import NotebookConsole, is_notebook

STEP = {"step": 3, "phase": "prune", "loss": 1.5, "kept": 0.8}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What the notebook was told to show, in order."""
    messages: list[dict[str, str]] = []

    def display(data: dict[str, str], **how: Any) -> Any:
        assert how == {"raw": True, "display_id": True}
        messages.append(data)
        return SimpleNamespace(update=lambda data, raw: messages.append(data))

    monkeypatch.setattr(ipython_display, "display", display)
    return messages


def test_stage_step_and_validation_are_shown_in_place(shown: list[dict[str, str]]) -> None:
    console = NotebookConsole()
    console.stage("tune and prune", 10)
    console.updated = 0.0
    console.step(STEP)
    assert "tune and prune · 3/10 · prune loss 1.500 kept 80.0%" in shown[-1]["text/plain"]
    assert '<progress value="3" max="10">' in shown[-1]["text/html"]
    console.validation({"step": 3, "nll": 1.25, "kept": 0.8})
    assert "valid nll 1.250" in shown[-1]["text/plain"]
    console.stage("evaluate", 1)
    console.evaluation_progress("choice", 4, 4)
    console.close()
    assert shown[-1]["text/plain"].splitlines() == [
        "tune and prune · prune loss 1.500 kept 80.0% · valid nll 1.250",
        "evaluate · choice",
    ]
    assert "<progress" not in shown[-1]["text/html"]


def test_names_of_tasks_are_text(shown: list[dict[str, str]]) -> None:
    console = NotebookConsole()
    console.stage("evaluate", 1)
    console.evaluation_progress("<script>alert(1)</script>\x1b[31m", 1, 1)
    assert "<script>" not in shown[-1]["text/html"]
    assert "\x1b" not in shown[-1]["text/html"] + shown[-1]["text/plain"]
    console.close()


def test_bars_of_transformers_come_back(shown: list[dict[str, str]]) -> None:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    console = NotebookConsole()
    assert not logging.is_progress_bar_enabled()
    console.close()
    assert logging.is_progress_bar_enabled() == was_enabled


def test_only_a_kernel_is_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    assert is_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not is_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not is_notebook()
