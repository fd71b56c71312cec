"""The run folder: its files, its manifest, its lock, and the checks before a run is started or resumed."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from prunetune.config.fields import with_current_names
from prunetune.config.recipe import RunConfig, load_saved_recipe, to_mapping
from prunetune.config.yaml_file import read_yaml
from prunetune.errors import ConfigError, RunFolderError
from prunetune.manifest import Manifest
from prunetune.utils.files import PARTIAL, expand_path, write_text
from prunetune.utils.json_lines import JsonObject, append_json_line, read_json_lines, write_json_lines
from prunetune.utils.suggest import similar_names
from prunetune.utils.untrusted import read_text, refuse_special_files

log = logging.getLogger(__name__)
TUNING_STAGE = "tune and prune"  # a stage, in the manifest's timings
CHANGEABLE_ON_RESUME = frozenset({"out", "report_to"})  # what a resumed run may say otherwise


@dataclass(frozen=True)
class RunFolder:
    """Paths, manifest and logs of one run."""

    path: Path

    @property
    def model_folder(self) -> Path:
        """The resulting checkpoint; it exists only when it is complete and has passed its check."""
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
    def branch(self) -> Path:
        """The state from which the next smaller size of a run goes on."""
        return self.checkpoints / "branch"

    @property
    def good_checkpoints(self) -> Path:
        """States within all limits, to roll back to."""
        return self.path / "good"

    @property
    def dense_tuned_checkpoints(self) -> Path:
        """States of the dense model that is tuned as a teacher or for comparison."""
        return self.path / "tuned"

    @property
    def dense_tuned_adapter(self) -> Path:
        """The dense tuned model, as an adapter folder of PEFT; not there for a base in 4 bits or sharded weights."""
        return self.path / "tuned" / "adapter"

    @property
    def latency_table_file(self) -> Path:
        """The latency table by which budgets of time were set, for as long as the run is resumed."""
        return self.path / "latency.json"

    @property
    def bench_file(self) -> Path:
        """Speed of the dense and the pruned model, measured in turns."""
        return self.path / "bench.json"

    def size_folder(self, keep: float) -> RunFolder:
        """The run folder of one of several sizes."""
        return RunFolder(self.path / "sizes" / f"{keep:g}")

    def evaluation_file(self, name: str) -> Path:
        """Scores of the "dense", "tuned" or "pruned" model."""
        return self.path / "evaluation" / f"{name}.json"

    @property
    def drift_file(self) -> Path:
        """How far the run's models moved from the untuned one outside the domain."""
        return self.evaluation_file("drift")

    def read_manifest(self) -> Manifest:
        """What is known of the run so far; raises `ValueError` where the file is no JSON object."""
        file = self.path / "manifest.json"
        return Manifest.from_json(read_text(file)) if file.exists() else Manifest.empty()

    def update_manifest(self, **facts: Any) -> None:
        """Replace fields of the manifest."""
        write_text(self.path / "manifest.json", replace(self.read_manifest(), **facts).to_json())

    def append_record(self, name: str, record: JsonObject) -> None:
        """Add a line to `metrics.jsonl` or `validation.jsonl`."""
        append_json_line(self.path / name, record)

    def drop_records_after(self, step: int) -> None:
        """Drop records of steps that will be done again (-1: of all), and a line that a kill cut short."""
        for file in (self.path / "metrics.jsonl", self.path / "validation.jsonl"):
            if file.exists():
                records, _ = read_json_lines(file)
                write_json_lines(file, [record for record in records if record.get("step") in range(step + 1)])
        for file in (self.path / "decisions").glob("step-*.json"):
            number = file.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                file.unlink()


def check_folder(config: RunConfig, *, resume: bool, changeable: Collection[str] = CHANGEABLE_ON_RESUME) -> RunFolder:
    """The folder of a new or a resumed run, of which only the `changeable` options may differ; writes nothing.

    Raises `RunFolderError` for a folder that another run fills, that is no run, or that cannot be written to.
    """
    folder = RunFolder(run_path(config))
    recipe = folder.path / "config.yaml"
    _raise_if_not_writable(folder.path)
    if not resume:
        if _has_contents(folder.path):
            raise RunFolderError(f"{folder.path} exists already: continue it with --resume, or name another with --out")
    elif recipe.exists():
        refuse_special_files(folder.path.rglob("*"), RunFolderError)
        _raise_if_recipe_changed(recipe, config, changeable)
    elif _has_contents(folder.path):
        raise RunFolderError(f"{folder.path} holds no config.yaml, so it is no run to resume: name another with --out")
    else:
        names = [recipe.parent.name for recipe in folder.path.parent.glob("*/config.yaml")]
        close = ", ".join(str(folder.path.with_name(name)) for name in similar_names(folder.path.name, names))
        hint = f" (similar names: {close})" if close else ""
        log.warning("%s holds no run to resume%s: a new run starts", folder.path, hint)
    return folder


def run_path(config: RunConfig) -> Path:
    """The folder that `out` names; raises `RunFolderError` where it names none."""
    if not config.out.strip():
        raise RunFolderError(f"out {config.out!r} names no folder: name one with --out, such as runs/support")
    return expand_path(config.out)


def _raise_if_not_writable(path: Path) -> None:
    existing = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not existing.is_dir():
        what = "a file" if existing.exists() else "a link to nothing"
        raise RunFolderError(f"{existing} is {what}: name another folder with --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunFolderError(
            f"{existing} cannot be written to: change its permissions, or name another folder with --out"
        )


def _has_contents(path: Path) -> bool:
    """Whether it holds more than what is left by a run that is killed at its start: partial files, empty folders."""
    return any(child.suffix != PARTIAL and not child.is_dir() for child in path.rglob("*"))


def _raise_if_recipe_changed(recipe: Path, config: RunConfig, changeable: Collection[str]) -> None:
    try:
        before = flatten_options(to_mapping(load_saved_recipe(recipe)))
    except ConfigError as broken:
        raise RunFolderError(f"{recipe} cannot be read ({broken}): name another folder with --out") from broken
    saved = flatten_options(with_current_names(RunConfig, read_yaml(recipe, "this run's recipe", ""), quiet=True) or {})
    now = flatten_options(to_mapping(config))
    for options in (before, now):  # 0.1.0 wrote a rate of its own for all weights, which is now 0: the same
        options["train.weights_rate"] = options["train.weights_rate"] or options["train.learning_rate"]
    changed = [
        f"{key} was {before[key]!r} and is now {now[key]!r}"
        if key in saved
        else f"{key}, which the version that began the run did not have, is now {now[key]!r}"
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
    flat: JsonObject = {}
    for key, value in values.items():
        flat |= flatten_options(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def write_recipe(folder: RunFolder, config: RunConfig) -> None:
    """Write config.yaml, and into the manifest where its relative paths start: the working folder, seen from there."""
    write_text(folder.path / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
    folder.update_manifest(begun_in=os.path.relpath(os.getcwd(), folder.path.resolve()))


def create_run_folder(folder: RunFolder, config: RunConfig) -> None:
    """Make the folder and write the recipe, unless they are there."""
    folder.path.mkdir(parents=True, exist_ok=True)
    if not (folder.path / "config.yaml").exists():  # first: with it, the folder can be resumed
        write_recipe(folder, config)
    (folder.path / "evaluation").mkdir(exist_ok=True)
    folder.checkpoints.mkdir(exist_ok=True)


@contextmanager
def run_lock(folder: RunFolder) -> Iterator[None]:
    """Keep other processes off the run for the length of the block; raises `RunFolderError` where one works on it.

    The lock is on the folder itself and ends with the process, however it ends. Without effect on file systems that
    have no locks.
    """
    handle = os.open(folder.path, os.O_RDONLY)
    try:
        with suppress(OSError):
            if not _try_lock(handle, fcntl.LOCK_EX):
                time.sleep(0.2)  # `is_locked` of another process holds it for a moment
                if not _try_lock(handle, fcntl.LOCK_EX):
                    raise RunFolderError(
                        f"{folder.path}: another process works on this run: wait until it ends, or stop it first"
                    )
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process of this computer works on the run."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(handle, fcntl.LOCK_SH)
    except OSError:  # a file system without locks: it may be
        return True
    finally:
        os.close(handle)


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_run(path: Path) -> tuple[RunFolder, RunConfig]:
    """A run folder that exists, with its config; raises `RunFolderError` where there is none."""
    recipe = path / "config.yaml"
    if not recipe.is_file():
        raise RunFolderError(f"{path} is no run folder (no config.yaml): name one that `prunetune run` made")
    refuse_special_files(path.rglob("*"), RunFolderError)
    return RunFolder(path), load_saved_recipe(recipe)
