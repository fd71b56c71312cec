"""Checkpoints: adapters, generator, both optimisers and the plan at a step; safetensors, atomic, verified on load.

Not saved: base weights, which come from the model; random states and data positions, which are functions of the seed
and the step.
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
from prunetune.utils.untrusted import parse_json, read_text

MAX_CHECKPOINTS = 2  # older ones are deleted
Tensors = Mapping[str, Tensor]
# Key in state.json: attribute of `TrainingState`.
LATER_FIELDS = {"seen": "validation_history", "faults": "guard_state", "seconds": "seconds"}


@dataclass
class TrainingState:
    """Everything that a run needs to continue after `step` steps."""

    step: int = 0
    plan: Plan | None = None  # once the search has ended
    is_cut: bool = False  # adapters have the cut model's shapes
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # "adapters", "generator", "..._optimizer"
    validation_history: dict[str, Any] = field(default_factory=dict)  # of `ValidationHistory`
    guard_state: dict[str, Any] = field(default_factory=dict)  # of `StepGuard`
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
                # Moments are on their parameter's device, and so is the count of a fused optimiser's steps.
                on_device = moment != "step" or optimizer.defaults.get("fused")
                device = parameter.device if on_device else "cpu"
                optimizer.state[parameter][moment] = values[name].to(device, copy=True)


def group_by_moment(tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """{"name#moment": tensor} as {moment: {name: tensor}}."""
    result: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("#")
        result.setdefault(moment, {})[name] = tensor
    return result


class CheckpointStore(Protocol):
    """Where the loop saves its states, and finds the newest one."""

    def save(self, state: TrainingState) -> None:
        """Save a state."""

    def latest(self) -> TrainingState | None:
        """The newest state saved, if any."""


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: TrainingState) -> None:
        """Write one checkpoint, all of it or nothing, then delete all but the newest two."""
        with atomic_folder(self.folder / f"step-{state.step:07d}") as folder:
            hashes = {}
            for name, tensors in state.tensors.items():
                file = folder / f"{name}.safetensors"
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
                hashes[file.name] = sha256(file)
            plan = json.loads(state.plan.to_json()) if state.plan else None
            fields = {"step": state.step, "is_cut": state.is_cut, "plan": plan, "sha256": hashes}
            fields |= {key: getattr(state, attribute) for key, attribute in LATER_FIELDS.items()}
            write_text(folder / "state.json", json.dumps(fields))
        for old in self._all()[:-MAX_CHECKPOINTS]:
            shutil.rmtree(old)

    def latest(self) -> TrainingState | None:
        """The newest checkpoint that is whole: damaged ones are passed over."""
        for folder in reversed(self._all()):
            state = _read(folder)
            if state is not None:
                return state
        return None

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


class NullCheckpointStore:
    """Saves nothing, for runs that are not resumed but run again."""

    def save(self, state: TrainingState) -> None:
        """Do nothing."""

    def latest(self) -> TrainingState | None:
        """None."""
        return None


def _read(folder: Path) -> TrainingState | None:
    try:
        fields: dict[str, Any] = parse_json(read_text(folder / "state.json"), nan=True)
        if any(sha256(folder / name) != digest for name, digest in fields["sha256"].items()):
            return None
        tensors = {Path(name).stem: load_file(folder / name) for name in fields["sha256"]}
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    plan = Plan.from_json(json.dumps(fields["plan"])) if fields["plan"] else None
    later = {attribute: fields[key] for key, attribute in LATER_FIELDS.items()}
    return TrainingState(fields["step"], plan, fields["is_cut"], tensors, **later)
