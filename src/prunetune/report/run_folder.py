"""What a run folder holds, read leniently: a page about half a run beats no page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from prunetune.config.fields import with_current_names
from prunetune.config.recipe import RunConfig
from prunetune.errors import PrunetuneError, RunFolderError
from prunetune.evaluation.results import Evaluation
from prunetune.plan import Plan

Parsed = TypeVar("Parsed")
RunLogEntry = Mapping[str, Any]

MODELS = ("dense", "tuned", "pruned")


@dataclass(frozen=True)
class RunFiles:
    """The files of one run; what is absent is None or empty, and `missing` says so in words."""

    name: str
    config_text: str
    config: Mapping[str, Any]
    plan: Plan | None
    metrics: tuple[RunLogEntry, ...]
    validation: tuple[RunLogEntry, ...]
    evaluations: Mapping[str, Evaluation]  # by name in MODELS
    manifest: Mapping[str, Any]
    missing: tuple[str, ...]


def read_run(folder: Path) -> RunFiles:
    """Read a run folder; raises `RunFolderError` where the folder or its `config.yaml` is missing."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder; name the run folder that `prunetune run` made")
    try:
        config_text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError as unreadable:
        raise RunFolderError(
            f"{folder} holds no readable config.yaml; name the run folder that `prunetune run` made"
        ) from unreadable
    missing: list[str] = []
    config = _config(config_text, missing)
    return RunFiles(
        name=folder.resolve().name,
        config_text=config_text,
        config=config,
        plan=_parse_file(folder / "plan.json", Plan.from_json, missing, "the units kept are not shown"),
        metrics=_read_log(folder / "metrics.jsonl", missing, "the course of the run is not shown"),
        validation=_read_log(folder / "validation.jsonl", missing, "validation is not shown"),
        evaluations=_evaluations(folder / "evaluation", config, missing),
        manifest=_parse_file(
            folder / "manifest.json", _parse_object, missing, "sizes, speed and environment are not shown"
        )
        or {},
        missing=tuple(missing),
    )


def get_number(values: Any, *path: str) -> float | None:
    """The finite number at a path of nested mappings, or None."""
    value = lookup(values, *path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def lookup(values: Any, *path: str) -> Any:
    """The value at a path of nested mappings, or None."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def get_mapping(values: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at a path of nested mappings, or an empty one."""
    found = lookup(values, *path)
    return found if isinstance(found, Mapping) else {}


def _config(text: str, missing: list[str]) -> Mapping[str, Any]:
    try:
        return get_mapping(with_current_names(RunConfig, yaml.safe_load(text), quiet=True))
    except yaml.YAMLError:
        missing.append("config.yaml is not valid YAML: it is shown as it stands")
        return {}


def _evaluations(folder: Path, config: Mapping[str, Any], missing: list[str]) -> dict[str, Evaluation]:
    lost = {
        "dense": "no scores of the untuned dense model",
        "tuned": "no scores of the dense tuned model",
        "pruned": "no scores of the pruned model",
    }
    if lookup(config, "evaluate", "dense_tuned") is False and not (folder / "tuned.json").exists():
        del lost["tuned"]  # was never to be there
    found = {
        name: _parse_file(folder / f"{name}.json", Evaluation.from_json, missing, words) for name, words in lost.items()
    }
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def _parse_file(path: Path, parse: Callable[[str], Parsed], missing: list[str], lost: str) -> Parsed | None:
    shown = path.name if path.parent.name != "evaluation" else f"evaluation/{path.name}"
    if not path.is_file():
        missing.append(f"{shown} is missing: {lost}")
        return None
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, PrunetuneError, ValueError, KeyError, TypeError, AttributeError):
        missing.append(f"{shown} cannot be read: {lost}")
        return None


def _parse_object(text: str) -> Mapping[str, Any]:
    values = json.loads(text)
    if not isinstance(values, Mapping):
        raise ValueError("not an object")
    return values


def _read_log(path: Path, missing: list[str], lost: str) -> tuple[RunLogEntry, ...]:
    if not path.is_file():
        missing.append(f"{path.name} is missing: {lost}")
        return ()
    lines: list[RunLogEntry] = []
    broken = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(_parse_object(text))
        except ValueError:  # a run stopped in the middle of a line
            broken += bool(text.strip())
    if broken:
        missing.append(f"{path.name} has {broken} line{'s' * (broken > 1)} that cannot be read: left out")
    elif not lines:
        missing.append(f"{path.name} is empty: {lost}")
    return tuple(lines)
