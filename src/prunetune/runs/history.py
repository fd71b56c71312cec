"""The history of runs: one SQLite file for the runs of a folder, so that they can be listed and filtered.

The file is an index: run folders hold everything, and runs that it lacks are read from them. So no error with it stops
a run: a warning of one line is logged, and the run continues.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from prunetune.config.recipe import RunConfig
from prunetune.errors import ConfigError, PrunetuneError
from prunetune.runs.folder import RunFolder, is_locked, open_run
from prunetune.utils.files import expand_path
from prunetune.utils.untrusted import read_text

log = logging.getLogger(__name__)

NAME = "runs.sqlite"
LOCK_TIMEOUT = 5.0  # seconds to wait for another process that writes
TABLE = """create table if not exists runs (
    path text primary key, status text not null, started text, ended text, model text, layout text, seed integer,
    asked real, kept real, metrics text not null default '{}', command text, process text
)"""
# "gate failed": it ended outside a limit. "gone": its folder was removed.
STATUSES = ("running", "done", "failed", "interrupted", "gate failed", "gone")
COLUMNS = (
    "path", "status", "started", "ended", "model", "layout", "seed", "asked", "kept", "metrics", "command", "process",
)  # fmt: skip


@dataclass(frozen=True)
class RunEntry:
    """One run in the history."""

    path: Path
    status: str  # of STATUSES
    started: str  # ISO 8601, UTC
    ended: str
    model: str
    layout: str
    seed: int
    requested_keep: float  # budget.keep
    kept: float | None  # share of the decoder's parameters that remains
    metrics: Mapping[str, float]  # "accuracy" and other means over tasks, and "TASK.metric"
    command: str

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.path.name


@contextmanager
def register_run(folder: RunFolder, config: RunConfig, command: str) -> Iterator[None]:
    """Register a run at its start, and how it ended at its end; where that cannot be written, a warning is logged."""
    status, started = "failed", _now()
    beginning = {"status": "running", "started": started, "ended": "", "command": command}
    _write_or_warn(folder, {**_run_values(folder, config), **beginning})
    try:
        yield
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except PrunetuneError as failed:
        status = "gate failed" if failed.exit_code == 1 else "failed"
        raise
    finally:
        ending = {"status": status, "started": started, "ended": _now(), "command": command}
        _write_or_warn(folder, {**_run_values(folder, config), **ending})


def _write_or_warn(folder: RunFolder, values: Mapping[str, Any]) -> None:
    try:
        with closing(_open(_history_file(folder.path.absolute().parent))) as store, store:
            _insert(store, values)
    except (OSError, sqlite3.Error, ValueError) as broken:
        reason = " ".join(str(broken).split())
        log.warning("history: %s cannot be written (%s); the run continues without it", NAME, reason)


def _run_values(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """The columns that a run folder tells."""
    manifest = folder.read_manifest()
    dense, pruned = manifest.model.decoder_params, manifest.pruned.decoder_params
    return {
        "path": str(folder.path.absolute()),
        "model": config.model,
        "layout": config.layout,
        "seed": config.seed,
        "asked": config.budget.keep,
        "kept": pruned / dense if dense and pruned else None,
        "metrics": json.dumps(_mean_and_task_scores(folder)),
        "process": f"{socket.gethostname()} {os.getpid()}",
    }


def _mean_and_task_scores(folder: RunFolder) -> dict[str, float]:
    """Scores of the pruned model: the mean of each metric ("accuracy"), and every task's ("TASK.accuracy")."""
    from prunetune.evaluation.results import Evaluation

    file = folder.evaluation_file("pruned")
    if not file.exists():
        return {}
    evaluation = Evaluation.from_json(read_text(file))
    metrics = dict.fromkeys(metric for result in evaluation.tasks.values() for metric in result.scores)
    scores = {metric: evaluation.mean(metric).value for metric in metrics}
    for task, result in evaluation.tasks.items():
        scores |= {f"{task}.{metric}": score.value for metric, score in result.scores.items()}
    return {name: value for name, value in scores.items() if not math.isnan(value)}


# -- the file ----------------------------------------------------------------------------------------------------------


def _history_file(runs_folder: Path) -> Path:
    """`$PRUNETUNE_HOME/runs.sqlite`, or `runs.sqlite` in the parent of the run folders."""
    home = os.environ.get("PRUNETUNE_HOME")
    return (expand_path(home) if home else runs_folder) / NAME


def _open(file: Path) -> sqlite3.Connection:
    """The database, created where there is none; a file that is no database is renamed, and a new one created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(file)
    except sqlite3.DatabaseError as broken:
        if isinstance(broken, sqlite3.OperationalError):  # locked, or without permission: the file is intact
            raise
        aside = file.with_name(f"{NAME}.broken-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        file.rename(aside)
        log.warning("history: %s is no database any more: renamed to %s, and a new one created", file, aside.name)
        return _connect(file)


def _connect(file: Path) -> sqlite3.Connection:
    store = sqlite3.connect(file, timeout=LOCK_TIMEOUT)
    try:
        with store:
            store.execute(TABLE)
    except sqlite3.Error:
        store.close()
        raise
    return store


def _insert(store: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    columns, marks = ", ".join(values), ", ".join("?" * len(values))
    # Column names are ours, values are bound.
    store.execute(f"insert or replace into runs ({columns}) values ({marks})", tuple(values.values()))  # noqa: S608


def list_runs(runs_folder: Path) -> list[RunEntry]:
    """The runs in a folder's history, and run folders in it that are not registered yet; the newest first.

    Raises `ConfigError` where the folder does not exist or the history cannot be read.
    """
    file = _history_file(runs_folder)
    if not file.exists() and not runs_folder.is_dir():
        raise ConfigError(
            f"{runs_folder}: no such folder; name the one that holds the run folders, or set PRUNETUNE_HOME"
        )
    try:
        with closing(_open(file)) as store, store:
            known = {row[0] for row in store.execute("select path from runs")}
            for values in _unregistered(runs_folder, known):
                _insert(store, values)
            rows = store.execute(f"select {', '.join(COLUMNS)} from runs order by started desc, path").fetchall()  # noqa: S608
    except (OSError, sqlite3.Error) as broken:
        if not file.exists():
            raise ConfigError(
                f"{file} cannot be created ({broken}): set PRUNETUNE_HOME to a folder that can be written to"
            ) from broken
        raise ConfigError(f"{file} cannot be read ({broken}): try again, or remove it to have it rebuilt") from broken
    return [_entry(dict(zip(COLUMNS, row, strict=True))) for row in rows]


def _unregistered(runs_folder: Path, known: set[str]) -> Iterator[dict[str, Any]]:
    """The columns of each run folder that is not in the history."""
    for recipe in sorted(runs_folder.glob("*/config.yaml")):
        path = recipe.parent
        if str(path.absolute()) in known or (path / "cells").is_dir():  # a comparison is no run
            continue
        try:
            folder, config = open_run(path)
            manifest = folder.read_manifest()
            values = _run_values(folder, config)
        except (PrunetuneError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # no run folder of this version
        started = datetime.fromtimestamp(recipe.stat().st_mtime, UTC).isoformat(timespec="seconds")
        is_done = folder.evaluation_file("pruned").exists() or (manifest.sizes and folder.bench_file.exists())
        status = "gate failed" if manifest.failed else "done" if is_done else "interrupted"
        ending = {"status": status, "started": started, "ended": "", "command": manifest.command or ""}
        yield {**values, **ending, "process": ""}


def _entry(row: Mapping[str, Any]) -> RunEntry:
    path = Path(row["path"])
    return RunEntry(
        path=path,
        status=_status(path, row["status"], row["process"] or ""),
        started=row["started"] or "",
        ended=row["ended"] or "",
        model=row["model"] or "",
        layout=row["layout"] or "",
        seed=row["seed"] or 0,
        requested_keep=row["asked"] or 0.0,
        kept=row["kept"],
        metrics=json.loads(row["metrics"]),
        command=row["command"] or "",
    )


def _status(path: Path, recorded: str, process: str) -> str:
    """The recorded status, unless the folder is gone, or the process was killed and could record nothing."""
    if not path.exists():
        return "gone"
    is_local = process.split(" ")[0] == socket.gethostname()
    return "interrupted" if recorded == "running" and is_local and not is_locked(path) else recorded


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
