"""The run folder: what is in it, and when it may be made or gone on with."""

from __future__ import annotations

import difflib
import fcntl
import json
import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prunetune.config.recipe import RunConfig, load_saved_recipe, to_mapping
from prunetune.errors import ConfigError, RunFolderError
from prunetune.utils.files import PARTIAL, write_text
from prunetune.utils.json_lines import JsonObject

log = logging.getLogger(__name__)
TUNING_STAGE = "tune and prune"  # a stage, in the manifest's timings
CHANGEABLE_ON_RESUME = frozenset({"out", "report_to"})  # what a resumed run may say otherwise


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @property
    def model_folder(self) -> Path:
        """The resulting checkpoint; exists only whole."""
        return self.path / "model"

    @property
    def plan_file(self) -> Path:
        """The units kept."""
        return self.path / "plan.json"

    @property
    def checkpoints(self) -> Path:
        """States to resume from."""
        return self.path / "checkpoints"

    @property
    def good_checkpoints(self) -> Path:
        """States within all gates, to go back to."""
        return self.path / "good"

    @property
    def dense_tuned_checkpoints(self) -> Path:
        """The same for the dense model that is tuned as a teacher or for comparison."""
        return self.path / "tuned"

    @property
    def bench_file(self) -> Path:
        """Speed beside the dense model, measured in turns."""
        return self.path / "bench.json"

    def size_folder(self, keep: float) -> RunFolder:
        """The folder of one of several sizes; a run folder, too."""
        return RunFolder(self.path / "sizes" / f"{keep:g}")

    def evaluation_file(self, name: str) -> Path:
        """Scores of `dense`, `tuned` or `pruned`."""
        return self.path / "evaluation" / f"{name}.json"

    def read_manifest(self) -> JsonObject:
        """What is known of the run so far."""
        file = self.path / "manifest.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def update_manifest(self, **facts: Any) -> None:
        """Add facts to the manifest."""
        write_text(self.path / "manifest.json", json.dumps(self.read_manifest() | facts, indent=2) + "\n")

    def append_record(self, name: str, record: JsonObject) -> None:
        """Add a line to `metrics.jsonl` or `validation.jsonl`."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def drop_records_after(self, step: int) -> None:
        """Drop records of steps that will be done again (-1: of all), and a line that a kill cut short."""
        for name in ("metrics.jsonl", "validation.jsonl"):
            file = self.path / name
            if file.exists():
                kept = [
                    line for line in file.read_text(encoding="utf-8").splitlines() if 0 <= _parse_step(line) <= step
                ]
                write_text(file, "".join(line + "\n" for line in kept))
        for file in (self.path / "decisions").glob("step-*.json"):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()


def _parse_step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def check_folder(config: RunConfig, *, resume: bool, changeable: Collection[str] = CHANGEABLE_ON_RESUME) -> RunFolder:
    """The folder of a new or resumed run, where only what is in `free` may differ; writes nothing.

    Raises `RunFolderError`.
    """
    folder = RunFolder(run_path(config))
    recipe = folder.path / "config.yaml"
    _raise_if_not_writable(folder.path)
    if not resume:
        if _has_contents(folder.path):
            raise RunFolderError(f"{folder.path} exists already: go on with it by --resume, or name another with --out")
    elif recipe.exists():
        _raise_if_recipe_changed(recipe, config, changeable)
    elif _has_contents(folder.path):
        raise RunFolderError(f"{folder.path} holds no config.yaml, so it is no run to resume; name another with --out")
    else:
        log.warning("%s holds no run to go on with%s: a run begins anew", folder.path, _similar_runs_hint(folder.path))
    return folder


def _similar_runs_hint(path: Path) -> str:
    """Runs of a like name beside a folder that is not there."""
    names = [recipe.parent.name for recipe in path.parent.glob("*/config.yaml")]
    close = ", ".join(str(path.with_name(name)) for name in difflib.get_close_matches(path.name, names))
    return f" (of a like name: {close})" if close else ""


def run_path(config: RunConfig) -> Path:
    """Where the run goes; raises `RunFolderError` for what names no folder."""
    if not config.out.strip() or "\0" in config.out:
        raise RunFolderError(f"out {config.out!r} names no folder: name one with --out, such as runs/support")
    return Path(config.out).expanduser()


def _raise_if_not_writable(path: Path) -> None:
    """Where no folder can be made, or written to."""
    try:
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    except OSError as wrong:
        raise RunFolderError(f"{path} cannot be opened ({wrong.strerror}): name another folder with --out") from wrong
    if not there.is_dir():
        raise RunFolderError(f"{there} is a file; name another folder with --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"{there} cannot be written to: change its permissions, or name another folder with --out")


def _has_contents(path: Path) -> bool:
    """Whether there is more than what a run that was killed as it began may leave."""
    return path.exists() and any(child.suffix != PARTIAL for child in path.iterdir())


def _raise_if_recipe_changed(recipe: Path, config: RunConfig, changeable: Collection[str]) -> None:
    try:
        before = flatten_options(to_mapping(load_saved_recipe(recipe)))
    except ConfigError as broken:
        raise RunFolderError(f"{recipe} cannot be read ({broken}): name another folder with --out") from broken
    now = flatten_options(to_mapping(config))
    changed = [
        f"{key} was {before[key]!r} and is now {now[key]!r}"
        for key in now
        if before[key] != now[key] and key not in changeable
    ]
    if changed:
        raise RunFolderError(
            f"{recipe.parent} was started with another recipe: {'; '.join(changed)}: "
            "resume with the old values, or name another folder with --out"
        )


def flatten_options(values: JsonObject, prefix: str = "") -> JsonObject:
    """Nested options by their dotted names."""
    found: JsonObject = {}
    for key, value in values.items():
        found |= flatten_options(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def create_run_folder(folder: RunFolder, config: RunConfig) -> None:
    """Make the folder and write the recipe, if it is new."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if not (folder.path / "config.yaml").exists():  # first: it is what makes the folder one that can be resumed
        write_text(folder.path / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
    (folder.path / "evaluation").mkdir(exist_ok=True)
    folder.checkpoints.mkdir(exist_ok=True)


@contextmanager
def run_lock(folder: RunFolder) -> Iterator[None]:
    """No other process may work on the run meanwhile; raises `RunFolderError` where one does.

    The lock is on the folder itself and ends with the process, however it ends. File systems without locks have none.
    """
    handle = os.open(folder.path, os.O_RDONLY)
    try:
        with suppress(OSError):
            if not (_try_lock(handle, fcntl.LOCK_EX) or _retry_lock(handle)):
                raise RunFolderError(
                    f"{folder.path}: another process works on this run: wait until it ends, or stop it first"
                )
        yield
    finally:
        os.close(handle)


def _retry_lock(handle: int) -> bool:
    """`is_held` may have looked at this very moment."""
    time.sleep(0.2)
    return _try_lock(handle, fcntl.LOCK_EX)


def is_locked(path: Path) -> bool:
    """Whether a process of this computer works on the run."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(handle, fcntl.LOCK_SH)
    except OSError:  # no locks here: nothing is known
        return True
    finally:
        os.close(handle)


def _try_lock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """A run folder that exists, with its config; raises `RunFolderError`."""
    recipe = path / "config.yaml"
    if not recipe.is_file():
        raise RunFolderError(f"{path} is no run folder (no config.yaml); name one that `prunetune run` made")
    return RunFolder(path), load_saved_recipe(recipe)
