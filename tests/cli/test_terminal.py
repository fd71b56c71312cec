"""The live line of a run and `watch` in terminals of 60, 80 and 120 columns: nothing torn, step and time left there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prunetune.report import write_report
from support.report import make_run
from support.terminal import run_in_terminal

RUN = """
import logging, sys, time
import prunetune.cli.app
from prunetune.utils.console import make_console

def app(*_, **__):
    console = make_console(10)
    console.stage("reading model and data", 0)
    logging.getLogger("prunetune").info("loading a model of a long name: " + "/work" * 40)
    console.stage("tune and prune, a stage whose name is longer than others are, as those of comparisons", 3000)
    for step in range(1, 31):
        time.sleep(0.02)
        if step % 10 == 0:
            logging.getLogger("a.library").warning("a warning " * 20)
            console.validation({"nll": 2.2, "valid.accuracy": 0.5, "guard.perplexity": 12.3, "guard.accuracy": 0.4})
        record = {"step": step, "phase": "search", "loss": 2.5, "kept": 0.8, "memory_mb": 1.2e4, "tokens_per_s": 1e5}
        console.step(record)
    console.close()
    print("the result")

prunetune.cli.app.app = app
sys.argv = ["prunetune", *sys.argv[1:]]
prunetune.cli.app.main()
"""


@pytest.mark.parametrize("width", [60, 80, 120])
def test_live_line_shows_bar_step_and_time_left_and_nothing_is_torn(width: int) -> None:
    code, screen = run_in_terminal(["-c", RUN, "run"], width)
    assert code == 0, screen.frames[-1]
    assert not screen.torn
    live = [line for frame in screen.frames for line in frame.splitlines() if " left " in line]
    assert any(re.match(r"[━╸╺ ]{8,} \d+/3000 \d\d:\d\d left tune and pr", line) for line in live), live[-3:]
    figures = [line for frame in screen.frames for line in frame.splitlines() if line.startswith("search loss 2.5")]
    assert any("kept 80.0%" in line for line in figures)
    last = screen.frames[-1]
    assert " left " not in last, "what was live is gone at the end"
    for line in (
        r"^\d\d:\d\d reading model and data$",
        r"^\d\d:\d\d tune and prune",
        "^loading a model",
        "^the result$",
    ):
        assert re.search(line, last, re.MULTILINE), last
    assert last.count("a warning") >= 3 * 20 - 6, "log lines stay, broken between words"


def test_quiet_run_prints_its_result_and_warnings_only() -> None:
    _, screen = run_in_terminal(["-c", RUN, "run", "--quiet"], 80)
    words = " ".join(screen.frames[-1].split())
    assert re.sub("(a warning ?)+", "W ", words).split() == ["W", "the", "result"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_watch_fits_the_terminal(width: int, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder)
    code, screen = run_in_terminal(["-m", "prunetune", "watch", str(folder)], width)
    assert code == 0
    assert not screen.torn
    last = screen.frames[-1]
    assert "700 of 700" in last
    assert "━" in last
    assert "…" not in last, "no heading and no figure is cut off"
