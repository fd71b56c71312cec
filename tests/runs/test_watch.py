"""The live view shows what the files hold, also while they are written, and ends when the run does."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from prunetune.errors import RunFolderError
from prunetune.report import write_report
from prunetune.runs.folder import RunFolder, open_run, run_lock
from prunetune.runs.watch import (
    LOCK_CHECK_SECONDS,
    STOPPED_AFTER_SECONDS,
    read_snapshot,
    render_snapshot,
    sparkline,
    watch_run,
)
from support.report import make_run


def shown(folder: Path) -> str:
    console = Console(file=io.StringIO(), width=110)
    console.print(render_snapshot(read_snapshot(*open_run(folder))))
    return plain(console)


def plain(console: Console) -> str:
    """What was shown, without frame and line breaks."""
    return " ".join(console.file.getvalue().replace("│", " ").split())  # type: ignore[attr-defined]


def test_finished_run_is_shown_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    write_report(folder)
    console = Console(file=io.StringIO(), width=110)
    watch_run(folder, console=console)
    said = plain(console)
    assert "ended; the report is written" in said
    assert "700 of 700" in said
    assert "60.0%" in said


def test_run_of_several_sizes_shows_no_steps_of_its_own(tmp_path: Path) -> None:
    """A run of several sizes, once it has ended: steps are in the folders of the sizes."""
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    said = shown(folder)
    assert "ended; the report is written" in said
    assert "of 700" not in said


def test_running_run_shows_steps_time_left_and_broken_limits(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:30]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 310, "pha']))
    validation = (folder / "validation.jsonl").read_text().splitlines()[:3]
    (folder / "validation.jsonl").write_text("\n".join(validation))
    said = shown(folder)
    assert "300 of 700, about 5 min 20 s left" in said
    assert "search" in said
    assert "limits broken: guard.perplexity" in said
    assert "guard guard" in said
    assert "perplexity accuracy" in said


def test_run_before_its_first_step_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "validation.jsonl", "manifest.json"):
        (folder / name).unlink()
    assert "before the first step" in shown(folder)
    (folder / "manifest.json").write_text("{")
    (folder / "metrics.jsonl").write_text('[]\n{"step": "x"}\nnull\n\xff\n')
    assert "0 of 700" in shown(folder)


def test_watch_ends_for_a_run_that_was_killed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    long_ago = time.time() - STOPPED_AFTER_SECONDS - 60
    for file in folder.rglob("*"):
        os.utime(file, (long_ago, long_ago))
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:30]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    os.utime(folder / "metrics.jsonl", (long_ago, long_ago))
    console = Console(file=io.StringIO(), width=110)
    watch_run(folder, console=console)
    assert "continue it with `prunetune run ... --resume`" in plain(console)


def test_watch_ends_where_no_process_works_on_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    while_ago = time.time() - LOCK_CHECK_SECONDS - 5
    for file in folder.rglob("*"):
        os.utime(file, (while_ago, while_ago))
    console = Console(file=io.StringIO(), width=110)
    watch_run(folder, console=console)
    assert "stopped: no process works on it; continue it with `prunetune run ... --resume`" in plain(console)


def test_watch_waits_while_a_process_works_on_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is silent, until it ends; a size is worked on with the run around it."""
    folder = make_run(tmp_path / "run")
    size = make_run(folder / "sizes" / "0.6")
    for place in (folder, size):
        looks: list[int] = []

        def ends(seconds: float, looks: list[int] = looks) -> None:
            looks.append(1)
            if len(looks) == 3:
                raise InterruptedError

        monkeypatch.setattr("prunetune.runs.watch.time.sleep", ends)
        long_ago = time.time() - LOCK_CHECK_SECONDS - 5
        for file in folder.rglob("*"):
            os.utime(file, (long_ago, long_ago))
        with run_lock(RunFolder(folder)), pytest.raises(InterruptedError):
            watch_run(place, console=Console(file=io.StringIO(), width=110))
        assert len(looks) == 3


def test_failure_is_shown_as_plain_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"failed": "stopped at step 40: [red]guard[/red]"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_report(folder)
    assert "stopped at step 40: [red]guard[/red]" in shown(folder)


def test_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no run folder"):
        watch_run(tmp_path)


def test_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█" or sparkline([1.0, 2.0, 3.0])[0] == "▁"
    assert len(sparkline([float(n) for n in range(1000)])) <= 40
    assert sparkline([5.0]) == "▁"
    assert sparkline([]) == ""
    assert sparkline([math.nan, math.inf]) == ""
