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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from prunetune.config.recipe import RunConfig
from prunetune.errors import ConfigError, PrunetuneError
from prunetune.runs.folder import RunFolder, is_locked, open_run
from prunetune.utils.files import expand_path
from prunetune.utils.sqlite import UNUSABLE, run_in_database
from prunetune.utils.untrusted import parse_json, read_text

log = logging.getLogger(__name__)

NAME = "runs.sqlite"
TABLE = """create table if not exists runs (
    path text primary key, status text not null, started text, ended text, model text, layout text, seed integer,
    asked real, kept real, metrics text not null default '{}', command text, process text
)"""
# "gate failed": it ended outside a limit. "gone": its folder was removed.
STATUSES = ("running", "done", "failed", "interrupted", "gate failed", "gone")
COLUMNS = (
    "path", "status", "started", "ended", "model", "layout", "command", "process", "metrics", "seed", "asked", "kept",
)  # fmt: skip
NUMBERS = frozenset({"seed", "asked", "kept"})  # all other columns are text


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
    _write_or_warn(folder, config, {"status": "running", "started": started, "ended": "", "command": command})
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
        _write_or_warn(folder, config, ending)


def _write_or_warn(folder: RunFolder, config: RunConfig, values: Mapping[str, Any]) -> None:
    try:
        _insert(_history_file(folder.path.absolute().parent), [{**_run_values(folder, config), **values}])
    except (PrunetuneError, *UNUSABLE) as broken:
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
    return {name: value for name, value in scores.items() if math.isfinite(value)}


# -- the file ----------------------------------------------------------------------------------------------------------


def _history_file(runs_folder: Path) -> Path:
    """`$PRUNETUNE_HOME/runs.sqlite`, or `runs.sqlite` in the parent of the run folders."""
    home = os.environ.get("PRUNETUNE_HOME")
    return (expand_path(home) if home else runs_folder) / NAME


def _insert(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    def insert(store: sqlite3.Connection) -> None:
        for row in rows:
            columns, marks = ", ".join(row), ", ".join("?" * len(row))
            # Column names are ours, values are bound.
            store.execute(f"insert or replace into runs ({columns}) values ({marks})", tuple(row.values()))  # noqa: S608

    run_in_database(file, [TABLE], insert)


def list_runs(runs_folder: Path) -> list[RunEntry]:
    """The runs in a folder's history, and run folders in it that are not registered yet; the newest first.

    A history that cannot be read, and rows that are damaged, cost a warning: the run folders are read instead.
    Raises `ConfigError` where there is neither a history nor the folder.
    """
    file = _history_file(runs_folder)
    is_there = os.path.exists(file)
    if not is_there and not runs_folder.is_dir():
        raise ConfigError(
            f"{runs_folder}: no such folder; name the one that holds the run folders, or set PRUNETUNE_HOME"
        )
    query = f"select {', '.join(COLUMNS)} from runs"  # noqa: S608 - column names are ours
    rows: list[tuple[Any, ...]] | None = None
    try:
        rows = run_in_database(file, [TABLE], lambda store: store.execute(query).fetchall()) if is_there else []
    except UNUSABLE as broken:
        reason = " ".join(str(broken).split())
        log.warning("history: %s cannot be read (%s); the run folders are read instead", file, reason)
    entries: dict[str, RunEntry] = {}
    for row in rows or ():
        try:
            entry = _entry(dict(zip(COLUMNS, row, strict=True)))
            entries[str(entry.path)] = entry
        except (ValueError, OSError) as damaged:
            log.warning("history: a row of %s is damaged (%s); its run folder is read instead", file, damaged)
    fresh = list(_unregistered(runs_folder, entries))
    if fresh and rows is not None:
        with suppress(*UNUSABLE):  # a place that is only read: they are read from their folders every time
            _insert(file, fresh)
    listed = sorted([*entries.values(), *map(_entry, fresh)], key=lambda entry: entry.path)
    return sorted(listed, key=lambda entry: entry.started, reverse=True)


def _unregistered(runs_folder: Path, known: Collection[str]) -> Iterator[dict[str, Any]]:
    """The columns of each run folder that is not in the history."""
    for recipe in sorted(runs_folder.glob("*/config.yaml")):
        path = recipe.parent
        if str(path.absolute()) in known or (path / "cells").is_dir():  # a comparison is no run
            continue
        try:
            folder, config = open_run(path)
            manifest = folder.read_manifest()
            values = _run_values(folder, config)
            started = datetime.fromtimestamp(recipe.stat().st_mtime, UTC).isoformat(timespec="seconds")
        except (
            PrunetuneError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError,
        ):  # fmt: skip
            continue  # no run folder of this version
        is_done = folder.evaluation_file("pruned").exists() or (manifest.sizes and folder.bench_file.exists())
        status = "gate failed" if manifest.failed else "done" if is_done else "interrupted"
        ending = {"status": status, "started": started, "ended": "", "command": manifest.command or ""}
        yield {**values, **ending, "process": ""}


def _entry(row: Mapping[str, Any]) -> RunEntry:
    """A row as a run; raises `ValueError` where it holds what no run writes."""
    for name, value in row.items():
        if type(value) not in ((int, float, NoneType) if name in NUMBERS else (str, NoneType)):
            raise ValueError(f"column {name}: {str(value)[:40]!r}")
    metrics, path = parse_json(row["metrics"] or "", nan=True), Path(row["path"] or "")
    if path == Path():
        raise ValueError("no path")
    if not isinstance(metrics, dict) or not all(type(value) in (int, float) for value in metrics.values()):
        raise ValueError(f"column metrics: {row['metrics'][:40]!r}")
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
        metrics=metrics,
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
