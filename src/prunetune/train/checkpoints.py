"""Checkpoints: adapters, generator, both optimisers and the plan at a step; safetensors, atomic, verified on load.

Not saved: base weights, which come from the model; random states and data positions, which are functions of the seed
and the step.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunetune.errors import PlanError, RunFolderError
from prunetune.model.provenance import ModelIdentity
from prunetune.plan import Plan
from prunetune.utils.files import atomic_folder, json_digest, sha256, write_text
from prunetune.utils.untrusted import parse_json, read_text

log = logging.getLogger(__name__)
STATE_FILE = "state.json"
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
    """The `checkpoints/` folder of a run, whose adapters fit one base model only: that which is given, if any."""

    def __init__(self, folder: Path, base: ModelIdentity | None = None) -> None:
        self.folder, self.base = folder, base

    def save(self, state: TrainingState) -> None:
        """Write one checkpoint, all of it or nothing, then delete all but the newest two."""
        with atomic_folder(self.folder / f"step-{state.step:07d}") as folder:
            hashes = {}
            for name, tensors in state.tensors.items():
                file = folder / f"{name}.safetensors"
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)
                hashes[file.name] = sha256(file)
            plan = json.loads(state.plan.to_json()) if state.plan else None
            base = dict(self.base.digests) if self.base else {}
            fields = {"step": state.step, "is_cut": state.is_cut, "plan": plan, "base": base, "sha256": hashes}
            fields |= {key: getattr(state, attribute) for key, attribute in LATER_FIELDS.items()}
            fields = parse_json(json.dumps(fields), nan=True)  # as they will be read
            fields["sha256"][STATE_FILE] = json_digest(fields)
            write_text(folder / STATE_FILE, json.dumps(fields))
        for old in self._all()[:-MAX_CHECKPOINTS]:
            shutil.rmtree(old)

    def latest(self) -> TrainingState | None:
        """The newest checkpoint that is whole: damaged ones are passed over, with a warning.

        Raises `RunFolderError` where it was made on another base model.
        """
        for folder in reversed(self._all()):
            try:
                state, base = _read(folder)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, PlanError, SafetensorError) as damage:
                log.warning("%s: a damaged checkpoint is passed over (%s)", folder, damage)
                continue
            if self.base and base and (changes := self.base.changes_since(base)):
                raise RunFolderError(
                    f"{folder}: this checkpoint was made on another base model ({changes}): put the old files back, or "
                    "start anew with another --out"
                )
            return state
        return None

    def _all(self) -> list[Path]:
        names = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return [self.folder / f"step-{name}" for name in sorted(filter(str.isdecimal, names), key=int)]


class NullCheckpointStore:
    """Saves nothing, for runs that are not resumed but run again."""

    def save(self, state: TrainingState) -> None:
        """Do nothing."""

    def latest(self) -> None:
        """None."""


def _read(folder: Path) -> tuple[TrainingState, Mapping[str, str]]:
    """(state, digests of its base model's files); raises `ValueError` or what reading damaged values raises."""
    fields: dict[str, Any] = parse_json(read_text(folder / STATE_FILE), nan=True)
    hashes = dict(fields["sha256"])
    seal = hashes.pop(STATE_FILE, None)
    if seal is None and "base" not in fields:  # by 0.1.0, which sealed the tensors only
        step_is_wrong = folder.name != f"step-{fields['step']:07d}"
    else:
        step_is_wrong = seal != json_digest(fields | {"sha256": hashes})
    if step_is_wrong:
        raise ValueError(f"{STATE_FILE} is not what was written")
    for name, digest in hashes.items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    tensors = {Path(name).stem: load_file(folder / name) for name in hashes}
    plan = Plan.from_json(json.dumps(fields["plan"])) if fields["plan"] is not None else None
    later = {attribute: fields[key] for key, attribute in LATER_FIELDS.items()}
    return TrainingState(fields["step"], plan, fields["is_cut"], tensors, **later), fields.get("base", {})
