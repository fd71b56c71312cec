"""Names and texts of others reach terminal and pages without a character that steers them; JSON keeps them exactly."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Console

from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.runs.watch import watch_run
from prunetune.utils.console import LiveConsole
from support.endpoint import serving
from support.page import ATTACK, steering
from support.report import make_run, write_lines
from support.suites import open_rows

Said = Callable[..., tuple[int, str, str]]
NAME = f"[red]{ATTACK}\nholds   all: limits"


def hostile_scores(right: bool) -> Evaluation:
    items = tuple(Item(f"{n}{NAME}", NAME, NAME, NAME, right, {"accuracy": float(right)}) for n in range(4))
    return Evaluation({NAME: TaskResult(NAME, {"accuracy": Score(float(right), 0.1, 4)}, items, error="")})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose folder, model, tasks, answers, phases and failure hold what steers a terminal."""
    folder = make_run(tmp_path / "runs" / f"run {ATTACK}".replace("/", ""))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model": NAME}))
    for name in ("dense", "tuned", "pruned"):
        (folder / "evaluation" / f"{name}.json").write_text(hostile_scores(name == "tuned").to_json())
    line = {"step": 1, "phase": NAME, "loss": 1.0, "kept": 0.6, "nll": 1.0, "broken": [NAME]}
    write_lines(folder / "metrics.jsonl", [line])
    write_lines(folder / "validation.jsonl", [line])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "failed": NAME, "command": [NAME]}))
    return folder


def clean(said: tuple[int, str, str]) -> str:
    _, out, err = said
    assert "\\x1b" in out + err, "it is shown, as an escape"
    assert not steering(out)
    assert not steering(err)
    return out + err


def test_run_folders_of_others_steer_no_terminal(run: Path, say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRUNETUNE_HOME", raising=False)
    clean(say("runs", run.parent))
    clean(say("compare-runs", run, run))
    other = make_run(run.parent / "other")
    clean(say("compare-runs", other, run))
    clean(say("report", run))
    assert not steering((run / "report.html").read_text(encoding="utf-8"))
    terminal = io.StringIO()
    watch_run(run, console=Console(file=terminal, width=300))
    assert "\\x1b" in terminal.getvalue()
    assert not steering(terminal.getvalue())


def test_results_of_others_steer_no_terminal_and_stay_exact_in_json(tmp_path: Path, say: Said) -> None:
    for name, right in (("good", True), ("bad", False)):
        (tmp_path / f"{name}.json").write_text(hostile_scores(right).to_json())
    tasks = {NAME: {"data": "rows.jsonl", "scorer": "accuracy", "limits": {"min": 0.5}}, f"2{NAME}": {NAME: 1}}
    write_lines(tmp_path / "rows.jsonl", open_rows())
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"tasks": tasks}))
    clean(say("eval", tmp_path / "good.json", "--suite", suite, "--out", tmp_path / "out.json"))
    assert list(json.loads((tmp_path / "out.json").read_text())["tasks"]) == [NAME]
    files = {"--json": tmp_path / "check.json", "--junit": tmp_path / "check.xml"}
    flags = [part for pair in files.items() for part in pair]
    said = say("check", tmp_path / "bad.json", "--suite", suite, "--against", tmp_path / "good.json", *flags)
    assert not [line for line in clean(said).splitlines() if line.startswith("holds   all")], "no forged line"
    assert NAME in json.loads(files["--json"].read_text())["scores"]
    document = files["--junit"].read_text()
    assert not steering(document)
    assert ElementTree.fromstring(document).findall(".//failure")


@pytest.mark.parametrize("text", [{f"{NAME}": 1}, {"data": {"train": NAME}}, {"layout": NAME}])
def test_recipes_of_others_steer_no_terminal(text: dict[str, Any], tmp_path: Path, say: Said) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(text))
    code, out, error = say("run", recipe, "--dry-run")
    assert not steering(out + error)
    assert (code, error.count("\n")) == (2, 1)


def test_servers_steer_no_terminal(tmp_path: Path, say: Said) -> None:
    write_lines(tmp_path / "rows.jsonl", open_rows())
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"tasks": {NAME: {"data": "rows.jsonl", "scorer": "exact_match"}}}))
    with serving(lambda *_: 404, error=NAME) as server:
        clean(say("eval", server.url, "--suite", suite, "--model-name", NAME))


def test_live_progress_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    live, terminal = LiveConsole(), Console(file=io.StringIO(), width=400)
    live.progress.live.console = Console(file=io.StringIO())
    live.stage(NAME, 2)
    live.evaluation_progress(NAME, 1, 2)
    terminal.print(*live.progress.get_renderables())
    live.close()
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("[red]") == 2
    assert not steering(shown)


PROCESS = """
import logging, sys, warnings
import prunetune.cli.app
def app(*_, **__):
    logging.getLogger("prunetune").info("log \x1b[2J")
    warnings.warn("warning \u202e")
    raise RuntimeError("bug \x07")
prunetune.cli.app.app = app
sys.argv = ["prunetune", "runs"]
prunetune.cli.app.main()
"""


def test_log_warnings_and_tracebacks_steer_no_terminal() -> None:
    ended = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    for text in ("log \\x1b[2J", "UserWarning: warning \\u202e", "RuntimeError: bug \\x07", "Traceback"):
        assert text in ended.stderr
    assert not steering(ended.stderr)
