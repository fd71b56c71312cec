"""The runs of a place in one SQLite file, so that they can be listed, filtered and compared. No service, no network.

The file is an index: run folders hold all there is to know, and what it lacks is read from them. So nothing that goes
wrong with it may stop a run: it is said in one line, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
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

log = logging.getLogger(__name__)

NAME = "runs.sqlite"
LOCK_TIMEOUT = 5.0  # seconds for another process that writes
TABLE = """create table if not exists runs (
    path text primary key, status text not null, started text, ended text, model text, layout text, seed integer,
    asked real, kept real, metrics text not null default '{}', command text, process text
)"""
STATUSES = ("running", "done", "failed", "interrupted", "gate failed", "gone")  # gone: its folder is
COLUMNS = (
    "path", "status", "started", "ended", "model", "layout", "seed", "asked", "kept", "metrics", "command", "process",
)  # fmt: skip


@dataclass(frozen=True)
class RunEntry:
    """One run as the history knows it."""

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


def history_file(run: Path) -> Path:
    """Where a run is registered: `$PRUNETUNE_HOME/runs.sqlite`, or `runs.sqlite` beside the run folder."""
    home = os.environ.get("PRUNETUNE_HOME")
    return (Path(home).expanduser() if home else run.absolute().parent) / NAME


@contextmanager
def register_run(folder: RunFolder, config: RunConfig, command: str) -> Iterator[None]:
    """Register a run as it begins, and how it ended; a history that cannot be written costs one line of the log."""
    status, begun = "failed", _now()
    _write_or_warn(
        folder, {**_facts(folder, config), "status": "running", "started": begun, "ended": "", "command": command}
    )
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
        ending = {"status": status, "started": begun, "ended": _now(), "command": command}
        _write_or_warn(folder, {**_facts(folder, config), **ending})


def _write_or_warn(folder: RunFolder, values: Mapping[str, Any]) -> None:
    try:
        file = history_file(folder.path)
        with closing(_open(file)) as store, store:
            _put(store, values)
    except (OSError, sqlite3.Error, ValueError) as broken:
        log.warning("history: %s cannot be written (%s); the run goes on without", NAME, " ".join(str(broken).split()))


def _facts(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    manifest = folder.read_manifest()
    model, pruned = manifest.get("model", {}), manifest.get("pruned", {})
    known = bool(model.get("decoder_params") and pruned.get("decoder_params"))
    return {
        "path": str(folder.path.absolute()),
        "model": config.model,
        "layout": config.layout,
        "seed": config.seed,
        "asked": config.budget.keep,
        "kept": pruned["decoder_params"] / model["decoder_params"] if known else None,
        "metrics": json.dumps(_metrics(folder)),
        "process": f"{socket.gethostname()} {os.getpid()}",
    }


def _metrics(folder: RunFolder) -> dict[str, float]:
    """The pruned model's scores: every task's, and the mean of each metric."""
    from prunetune.evaluation.results import Evaluation

    file = folder.evaluation_file("pruned")
    if not file.exists():
        return {}
    tasks = Evaluation.from_json(file.read_text(encoding="utf-8"))
    names = dict.fromkeys(name for result in tasks.tasks.values() for name in result.scores)
    each = {f"{task}.{name}": s.value for task, result in tasks.tasks.items() for name, s in result.scores.items()}
    found = {name: tasks.mean(name).value for name in names} | each
    return {name: value for name, value in found.items() if value == value}


# -- the file ----------------------------------------------------------------------------------------------------------


def _open(file: Path) -> sqlite3.Connection:
    """The store, made where there is none; one that is no database steps aside."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connected(file)
    except sqlite3.DatabaseError as broken:
        if isinstance(broken, sqlite3.OperationalError):  # locked, or no right to it: it is whole
            raise
        aside = file.with_name(f"{NAME}.broken-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        file.rename(aside)
        log.warning("history: %s is no database any more: put aside as %s, begun anew", file, aside.name)
        return _connected(file)


def _connected(file: Path) -> sqlite3.Connection:
    store = sqlite3.connect(file, timeout=LOCK_TIMEOUT)
    try:
        with store:
            store.execute(TABLE)
    except sqlite3.Error:
        store.close()
        raise
    return store


def _put(store: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    names = ", ".join(values)
    places = ", ".join("?" * len(values))
    # Column names are ours, values are bound.
    store.execute(f"insert or replace into runs ({names}) values ({places})", tuple(values.values()))  # noqa: S608


def list_runs(runs_folder: Path) -> list[RunEntry]:
    """The runs registered in a folder's history, and run folders in it that are not; the newest first.

    Raises `ConfigError` where the history cannot be read.
    """
    home = os.environ.get("PRUNETUNE_HOME")
    file = (Path(home).expanduser() if home else runs_folder) / NAME
    if not file.exists() and not runs_folder.is_dir():
        raise ConfigError(
            f"{runs_folder}: no such folder; name the one that holds the run folders, or set PRUNETUNE_HOME"
        )
    try:
        with closing(_open(file)) as store, store:
            known = {row[0] for row in store.execute("select path from runs")}
            for found in _unregistered(runs_folder, known):
                _put(store, found)
            rows = store.execute(f"select {', '.join(COLUMNS)} from runs order by started desc, path").fetchall()  # noqa: S608
    except (OSError, sqlite3.Error) as broken:
        if not file.exists():
            raise ConfigError(
                f"{file} cannot be made ({broken}); let PRUNETUNE_HOME name a folder that can be written to"
            ) from broken
        raise ConfigError(f"{file} cannot be read ({broken}); try again, or remove it: it is made anew") from broken
    return [_entry(dict(zip(COLUMNS, row, strict=True))) for row in rows]


def _unregistered(runs_folder: Path, known: set[str]) -> Iterator[dict[str, Any]]:
    for recipe in sorted(runs_folder.glob("*/config.yaml")):
        path = recipe.parent
        if str(path.absolute()) in known or (path / "cells").is_dir():  # a comparison is no run
            continue
        try:
            folder, config = open_run(path)
            manifest = folder.read_manifest()
            facts = _facts(folder, config)
        except (PrunetuneError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            continue  # no run folder of this version
        when = datetime.fromtimestamp(recipe.stat().st_mtime, UTC).isoformat(timespec="seconds")
        whole = folder.evaluation_file("pruned").exists() or ("sizes" in manifest and folder.bench_file.exists())
        status = "done" if whole else "interrupted"
        status = "gate failed" if manifest.get("failed") else status
        command = manifest.get("command", "")
        own = {"status": status, "started": when, "ended": "", "process": ""}
        yield {**facts, **own, "command": command if isinstance(command, str) else shlex.join(map(str, command))}


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


def _status(path: Path, noted: str, process: str) -> str:
    """As noted, unless the folder is gone, or the process was killed and could note nothing."""
    if not path.exists():
        return "gone"
    here = process.split(" ")[0] == socket.gethostname()
    return "interrupted" if noted == "running" and here and not is_locked(path) else noted


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
