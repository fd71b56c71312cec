"""Checkpoints: adapters, generator, both optimisers and the plan at a step; safetensors, atomic, verified on load.

Base weights are not saved (they come from the model), nor random states and data positions (they are functions of the
seed and the step).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunetune.plan import Plan
from prunetune.utils.files import atomic_folder, sha256, write_text

MAX_CHECKPOINTS = 2  # checkpoints that stay
Tensors = Mapping[str, Tensor]


@dataclass
class TrainingState:
    """All that a run knows after `step` tuning steps."""

    step: int = 0
    plan: Plan | None = None  # decided at the end of the search
    is_cut: bool = False  # adapters have the cut model's shapes
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # "adapters", "generator", "..._optimizer"
    validation_history: dict[str, Any] = field(
        default_factory=dict
    )  # what validations have found and changed, see `validation`
    guard_state: dict[str, Any] = field(default_factory=dict)  # what went wrong and was survived, see `faults`
    seconds: float = 0.0  # that these steps took, over all processes


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """AdamW's moments as {"name#exp_avg": tensor}; `names` in the order of the optimiser's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}#{key}": value
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` took."""
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    for moment, values in group_by_moment(tensors).items():
        for name, parameter in parameters.items():
            if name in values:
                # Moments live beside their parameter, and so does the count of a fused optimiser's steps.
                beside = moment != "step" or optimizer.defaults.get("fused")
                device = parameter.device if beside else "cpu"
                optimizer.state[parameter][moment] = values[name].to(device, copy=True)


def group_by_moment(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """{"name#moment": tensor} as {moment: {name: tensor}}."""
    result: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("#")
        result.setdefault(moment, {})[name] = tensor
    return result


class CheckpointStore(Protocol):
    """Where the loop leaves its states."""

    def save(self, state: TrainingState) -> None:
        """Keep a state."""

    def latest(self) -> TrainingState | None:
        """The newest state kept."""


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: TrainingState) -> None:
        """Write one checkpoint whole, then drop all but the newest two."""
        with atomic_folder(self.folder / f"step-{state.step:07d}") as folder:
            hashes = {}
            for part, tensors in state.tensors.items():
                file = folder / f"{part}.safetensors"
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
                hashes[file.name] = sha256(file)
            plan = json.loads(state.plan.to_json()) if state.plan else None
            about = {
                "step": state.step,
                "is_cut": state.is_cut,
                "plan": plan,
                "sha256": hashes,
                "seen": state.validation_history,
            }
            about |= {"faults": state.guard_state, "seconds": state.seconds}
            write_text(folder / "state.json", json.dumps(about))
        for old in self._all()[:-MAX_CHECKPOINTS]:
            shutil.rmtree(old)

    def latest(self) -> TrainingState | None:
        """The newest checkpoint that is whole; older ones stand in for a damaged one."""
        for folder in reversed(self._all()):
            state = _read(folder)
            if state is not None:
                return state
        return None

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


class NullCheckpointStore:
    """Saves nothing: for a comparison that is simply made again."""

    def save(self, state: TrainingState) -> None:
        """Let go of it."""

    def latest(self) -> TrainingState | None:
        """There is none."""
        return None


def _read(folder: Path) -> TrainingState | None:
    try:
        about: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if any(sha256(folder / name) != digest for name, digest in about["sha256"].items()):
            return None
        tensors = {Path(name).stem: load_file(folder / name) for name in about["sha256"]}
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    plan = Plan.from_json(json.dumps(about["plan"])) if about["plan"] else None
    attributes = {
        "seen": "validation_history",
        "faults": "guard_state",
        "seconds": "seconds",
    }  # older ones may lack these
    later = {attribute: about[key] for key, attribute in attributes.items() if key in about}
    return TrainingState(about["step"], plan, about["is_cut"], tensors, **later)
