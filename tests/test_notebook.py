"""The worked notebook, run headless: every cell succeeds, and what a reader is to see is there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


@pytest.mark.filterwarnings("default")  # of Jupyter's own
def test_notebook_runs_and_shows_progress_scores_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook works
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    def shown_by(source: str) -> str:
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and source in cell.source)
        data = [output.get("data", {}) for output in cell.outputs]
        texts = [output.get("text", "") for output in cell.outputs]
        return "\n".join([*texts, *(it.get("text/html", it.get("text/plain", "")) for it in data)])

    run = shown_by("prunetune.run(")
    assert re.search(r"tune and prune · tune loss [\d.]+ kept 50\.0%", run)
    assert "<progress" not in run  # all stages have ended
    assert "50% smaller decoder" in run
    assert "Loading weights" not in run
    scores = shown_by("pivot_table")
    assert all(f"<th>{name}</th>" in scores for name in ("dense", "pruned", "tuned", "accuracy"))
    assert shown_by("result.report").startswith("\n<iframe sandbox srcdoc=")
    assert "Team: billing" in shown_by("model.generate")


def test_notebook_is_stored_without_outputs() -> None:
    """They would hold paths of whoever ran it last."""
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)


def test_links_of_the_notebook_have_targets() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert all((NOTEBOOK.parent / link).exists() for link in links)
