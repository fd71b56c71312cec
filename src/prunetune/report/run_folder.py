"""The files of a run folder, read leniently: what is missing or broken is noted, and the rest is shown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prunetune.config.fields import with_current_names
from prunetune.config.recipe import RunConfig
from prunetune.config.yaml_file import parse_yaml
from prunetune.errors import PrunetuneError, RunFolderError
from prunetune.evaluation.results import Evaluation
from prunetune.manifest import Manifest, finite_number
from prunetune.plan import Plan
from prunetune.utils.json_lines import JsonObject, read_json_lines
from prunetune.utils.untrusted import read_text, refuse_special_files

Parsed = TypeVar("Parsed")

MODELS = ("dense", "tuned", "pruned")


@dataclass(frozen=True)
class RunFiles:
    """The files of one run; what is absent is None or empty, and `missing` says so in words."""

    name: str
    config_text: str
    config: Mapping[str, Any]
    plan: Plan | None
    metrics: tuple[JsonObject, ...]
    validation: tuple[JsonObject, ...]
    evaluations: Mapping[str, Evaluation]  # by name in MODELS
    manifest: Manifest
    missing: tuple[str, ...]
    drift: Evaluation | None = None  # its tasks are models; of "kl", "agreement" and "declines"

    @property
    def model_name(self) -> str:
        """The dense model by its manifest or its recipe; "" where neither names it."""
        return self.manifest.model.name or str(lookup(self.config, "model") or "")


def read_run(folder: Path) -> RunFiles:
    """Read a run folder; raises `RunFolderError` where the folder or its `config.yaml` is missing."""
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is not a folder; name the run folder that `prunetune run` made")
    refuse_special_files([folder / "config.yaml"], RunFolderError)
    try:
        config_text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError as unreadable:
        raise RunFolderError(
            f"{folder} holds no readable config.yaml; name the run folder that `prunetune run` made"
        ) from unreadable
    refuse_special_files(folder.rglob("*"), RunFolderError)  # a folder that is a run: any other may be large
    missing: list[str] = []
    try:
        config = get_mapping(with_current_names(RunConfig, parse_yaml(config_text), quiet=True))
    except ValueError:
        missing.append("config.yaml is not valid YAML: it is shown as it stands")
        config = {}
    plan = _parse_file(folder / "plan.json", Plan.from_json, missing, "the units kept are not shown")
    metrics = _read_log(folder / "metrics.jsonl", missing, "the training curves are not shown")
    validation = _read_log(folder / "validation.jsonl", missing, "validation is not shown")
    scores, evaluations = folder / "evaluation", dict[str, Evaluation]()
    for name, model in {"dense": "untuned dense", "tuned": "dense tuned", "pruned": "pruned"}.items():
        file = scores / f"{name}.json"
        if name == "tuned" and lookup(config, "evaluate", "dense_tuned") is False and not file.exists():
            continue  # was never to be there
        evaluation = _parse_file(file, Evaluation.from_json, missing, f"no scores of the {model} model")
        evaluations |= {name: evaluation} if evaluation else {}
    consequence = "sizes, speed and environment are not shown"
    manifest = _parse_file(folder / "manifest.json", Manifest.from_json, missing, consequence)
    drift = None
    if (scores / "drift.json").exists():  # else an older run, or one with `evaluate.drift` off
        consequence = "drift from the untuned model is not shown"
        drift = _parse_file(scores / "drift.json", Evaluation.from_json, missing, consequence)
    return RunFiles(
        name=folder.resolve().name,
        config_text=config_text,
        config=config,
        plan=plan,
        metrics=metrics,
        validation=validation,
        evaluations=evaluations,
        manifest=manifest or Manifest.empty(),
        drift=drift,
        missing=tuple(missing),
    )


def get_number(values: Any, *path: str) -> float | None:
    """The finite number at a path of nested mappings, or None."""
    value = finite_number(lookup(values, *path))
    return None if value is None else float(value)


def lookup(values: Any, *path: str) -> Any:
    """The value at a path of nested mappings, or None."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def get_mapping(values: Any, *path: str) -> Mapping[str, Any]:
    """The mapping at a path of nested mappings, or an empty one."""
    value = lookup(values, *path)
    return value if isinstance(value, Mapping) else {}


def _parse_file(path: Path, parse: Callable[[str], Parsed], missing: list[str], consequence: str) -> Parsed | None:
    name = path.name if path.parent.name != "evaluation" else f"evaluation/{path.name}"
    if not path.is_file():
        missing.append(f"{name} is missing: {consequence}")
        return None
    try:
        return parse(read_text(path))
    except (OSError, PrunetuneError, ValueError, KeyError, TypeError, AttributeError):
        missing.append(f"{name} cannot be read: {consequence}")
        return None


def _read_log(path: Path, missing: list[str], consequence: str) -> tuple[JsonObject, ...]:
    if not path.is_file():
        missing.append(f"{path.name} is missing: {consequence}")
        return ()
    lines, broken = read_json_lines(path)  # a run may have stopped in the middle of a line
    if broken:
        missing.append(f"{path.name} has {broken} line{'s' * (broken > 1)} that cannot be read: left out")
    elif not lines:
        missing.append(f"{path.name} is empty: {consequence}")
    return tuple(lines)
