"""The history of runs, read from their folders: a run's manifest says when it was started and how it ended."""

import logging
import math
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from prunetune.errors import ConfigError, PrunetuneError
from prunetune.evaluation.results import Evaluation
from prunetune.manifest import Manifest, finite_number
from prunetune.runs.folder import RunFolder, is_locked, open_run
from prunetune.utils.files import home_folder
from prunetune.utils.untrusted import parse_json, read_text

log = logging.getLogger(__name__)

FOLDERS = "runs.txt"  # in $PRUNETUNE_HOME: the folders that hold runs, one a line
STATUSES = ("running", "done", "failed", "interrupted", "limit broken")


@dataclass(frozen=True)
class RunEntry:
    """One run in the history, one of several sizes of a run, or a comparison."""

    path: Path
    kind: Literal["run", "size", "comparison"]
    status: str  # of STATUSES
    started: str  # ISO 8601, UTC
    ended: str
    model: str
    layout: str
    seed: int
    requested_keep: float  # budget.keep
    kept: float | None  # share of the decoder's parameters that remains
    metrics: Mapping[str, float]  # of the pruned model: see `final_scores`; of a comparison: "METHOD KEEP metric"
    command: str

    @property
    def name(self) -> str:
        """The run folder's name; a size has its run's in front, as "support/sizes/0.6"."""
        return "/".join(self.path.parts[-3:]) if self.kind == "size" else self.path.name


@contextmanager
def record_status(folder: RunFolder) -> Iterator[None]:
    """Record in the manifest when and where the block was started, and how it ended."""
    _register_folder(folder.path.absolute().parent)
    started = folder.read_manifest().started or _now()
    folder.update_manifest(status="running", started=started, ended="", host=socket.gethostname())
    status = "failed"
    try:
        yield
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except PrunetuneError as failed:
        status = "limit broken" if failed.exit_code == 1 else "failed"
        raise
    finally:
        try:
            folder.update_manifest(status=status, ended=_now())
        except (OSError, ValueError) as broken:  # which would hide the error that ended the run
            log.warning("%s: how the run ended cannot be written (%s)", folder.path, broken)


def _register_folder(runs_folder: Path) -> None:
    """Add a folder of runs to the list in $PRUNETUNE_HOME, if that is set."""
    home = home_folder()
    if home is None or str(runs_folder) in _registered_folders():
        return
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / FOLDERS).open("a", encoding="utf-8") as file:
            file.write(f"{runs_folder}\n")
    except OSError as broken:
        log.warning("%s cannot be written (%s): prunetune runs does not list this run", home / FOLDERS, broken)


def _registered_folders() -> list[str]:
    home = home_folder()
    try:
        return (home / FOLDERS).read_text(encoding="utf-8", errors="replace").splitlines() if home else []
    except OSError:
        return []


def final_scores(folder: RunFolder) -> dict[str, float]:
    """Scores of the pruned model: the mean of each metric ("accuracy"), and every task's ("TASK.accuracy")."""
    file = folder.evaluation_file("pruned")
    if not file.exists():
        return {}
    evaluation = Evaluation.from_json(read_text(file))
    metrics = dict.fromkeys(metric for result in evaluation.tasks.values() for metric in result.scores)
    scores = {metric: evaluation.mean(metric).value for metric in metrics}
    for task, result in evaluation.tasks.items():
        scores |= {f"{task}.{metric}": score.value for metric, score in result.scores.items()}
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def list_runs(runs_folder: Path) -> list[RunEntry]:
    """The runs, sizes and comparisons in a folder, and in those that $PRUNETUNE_HOME lists; the newest first.

    A folder that cannot be read as a run is left out. Raises `ConfigError` where there is no folder.
    """
    named = [runs_folder.absolute(), *map(Path, _registered_folders())]
    folders = list(dict.fromkeys(folder for folder in named if folder.is_dir()))
    if not folders:
        raise ConfigError(
            f"{runs_folder}: no such folder; name the one that holds the run folders, or set PRUNETUNE_HOME"
        )
    return read_entries(folders)


def read_entries(folders: Iterable[Path]) -> list[RunEntry]:
    """The runs, sizes and comparisons in these folders, the newest first; what is no run is left out."""
    patterns = ("*/config.yaml", "*/sizes/*/config.yaml")
    recipes = sorted({recipe for folder in folders for pattern in patterns for recipe in folder.glob(pattern)})
    entries = [entry for recipe in recipes if (entry := _read_entry(recipe.parent))]
    return sorted(entries, key=lambda entry: entry.started, reverse=True)


def _read_entry(path: Path) -> RunEntry | None:
    """The run in a folder; None where it holds none that this version reads."""
    try:
        folder, config = open_run(path)
        manifest = folder.read_manifest()
        is_comparison = (path / "cells").is_dir()
        dense, pruned = manifest.model.decoder_params, manifest.pruned.decoder_params
        begun = datetime.fromtimestamp((path / "config.yaml").stat().st_mtime, UTC)  # where the manifest does not say
        return RunEntry(
            path=path,
            kind="comparison" if is_comparison else "size" if path.parent.name == "sizes" else "run",
            status=_status(folder, manifest, is_comparison=is_comparison),
            started=manifest.started or begun.isoformat(timespec="seconds"),
            ended=manifest.ended or "",
            model=config.model,
            layout=config.layout,
            seed=config.seed,
            requested_keep=config.budget.keep,
            kept=pruned / dense if dense and pruned else None,
            metrics=_comparison_scores(path) if is_comparison else final_scores(folder),
            command=manifest.command or "",
        )
    except (
        PrunetuneError, OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, RecursionError,
    ):  # fmt: skip
        return None


def _status(folder: RunFolder, manifest: Manifest, *, is_comparison: bool) -> str:
    """The recorded status, unless the process was killed and could record nothing; else what the files say."""
    if manifest.status in STATUSES[1:]:
        return manifest.status
    if manifest.status == "gate failed":  # the word of earlier versions
        return "limit broken"
    result = folder.path / "comparison.json" if is_comparison else folder.evaluation_file("pruned")
    if manifest.status is None and manifest.failed:
        return "limit broken"
    if manifest.status is None and (result.exists() or (manifest.sizes and folder.bench_file.exists())):
        return "done"
    is_elsewhere = manifest.status == "running" and manifest.host != socket.gethostname()
    is_working = is_locked(folder.path) or is_locked(folder.path.parent.parent)  # the run that a size is of
    return "running" if is_elsewhere or is_working else "interrupted"


def _comparison_scores(path: Path) -> dict[str, float]:
    """The means of a comparison's table, as "progressive 0.6 acc"; empty where it is not written yet."""
    file = path / "comparison.json"
    rows: Any = parse_json(read_text(file))["rows"] if file.exists() else []
    return {
        f"{row['method']} {row['keep']:g} {metric}": value
        for row in rows
        for metric, score in row["scores"].items()
        if (value := finite_number(score["value"])) is not None
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
