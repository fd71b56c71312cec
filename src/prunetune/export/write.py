"""Write a cut model as a checkpoint that stock runtimes open: uniform (a plain architecture) or per-layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.integrity import seal
from prunetune.export.per_layer import PerLayer, per_layer_overrides
from prunetune.export.per_layer_code import write_code
from prunetune.export.shapes import empty, uniform, why_sibling
from prunetune.plan import Plan
from prunetune.pruning.units import Site, layout_of, surviving_layers
from prunetune.utils.files import new_folder


@dataclass(frozen=True)
class Written:
    """A finished checkpoint."""

    folder: Path
    architecture: str  # class that opens it
    layout: str
    needs_code: bool  # opens with trust_remote_code only
    params: int
    bytes: int
    note: str = ""  # why another class than the original's


def write(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    sites: Sequence[Site],
    folder: Path,
    *,
    layout: str,
    card: str,
    shards: Path | None = None,
    end: int | None = None,
) -> Written:
    """Write `model`, already cut by `plan`, whole or not at all. Tensors keep their dtype.

    `end`: a token that ends an answer, beside those of the model's generation settings.
    Where a folder of finished `shards` is given, these are its weights, and `model` has none.
    """
    layout = layout_of(layout, sites)
    config = uniform_config(model.config, plan, sites) if layout == "uniform" else copy.deepcopy(model.config)
    with new_folder(folder) as partial:
        if layout == "uniform":
            target = empty(config)
            _fill(target, model)
            target.generation_config = model.generation_config
            _save(target, partial, shards)
        else:
            layered = PerLayer.of(model)
            # Names as in memory: renaming on the way in goes by model_type, and this one is of our own.
            _save(model, partial, shards, save_original_format=False)
            write_code(partial, layered, sites, model)
            edit_json(partial / "config.json", per_layer_overrides(plan, sites, model.config) | layered.auto_map())
        add_old_rope_keys(partial / "config.json")
        if end is not None:
            add_end(partial / "generation_config.json", end, tokenizer.eos_token_id)
        tokenizer.save_pretrained(partial)
        (partial / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        seal(partial)
    files = list(folder.rglob("*.safetensors"))
    return Written(
        folder=folder,
        architecture=config.architectures[0] if layout == "uniform" else PerLayer.of(model).model_class,
        layout=layout,
        needs_code=layout != "uniform",
        params=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(path.stat().st_size for path in files),
        note=why_sibling(model.config, config),
    )


def uniform_config(config: Any, plan: Plan, sites: Sequence[Site]) -> Any:
    """The configuration of a uniform plan; raises `ModelError` where its layers differ."""
    widths: dict[str, set[int]] = {}
    left = set(surviving_layers(plan, sites))
    for site in sites:
        if site.layer in left and site.kind != "layers":
            lanes = len({unit // site.length for unit in plan.kept[site.name]}) if site.lanes > 1 else 1
            widths.setdefault(site.kind, set()).add(len(plan.kept[site.name]) // max(1, lanes))
    if any(len(width) > 1 or 0 in width for width in widths.values()):
        raise ModelError(f"plan has widths {widths} and layout uniform needs one of each kind: write it per-layer")
    found = {kind: next(iter(width)) for kind, width in widths.items()}
    return uniform(
        config,
        found.get("attention"),
        found.get("mlp"),
        ratio=found.get("query-heads"),
        experts=found.get("experts"),
        expert_channels=found.get("expert-channels"),
    )


def _fill(target: Any, model: Any) -> None:
    """Hand the tensors over; a name or a shape that does not fit the configuration fails here, before a file exists."""
    target.load_state_dict(model.state_dict(), assign=True)
    target.tie_weights()


def _save(model: Any, folder: Path, shards: Path | None, **how: Any) -> None:
    if shards is None:
        model.save_pretrained(folder, **how)
        return
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for file in sorted(shards.iterdir()):
        file.rename(folder / file.name)
    shards.rmdir()


def edit_json(path: Path, changes: dict[str, Any], *, without: Collection[str] = ()) -> None:
    """Change values of a configuration, and leave some out."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    values = {key: value for key, value in values.items() if key not in without}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_end(path: Path, end: int, end_of_text: int | None) -> None:
    """Have whoever serves the checkpoint stop at `end` too, after what is named already, else the end of text."""
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    known = named if isinstance(named, list) else [end_of_text if named is None else named]
    if end not in known:
        edit_json(path, {"eos_token_id": [*(token for token in known if token is not None), end]})


def add_old_rope_keys(path: Path) -> None:
    """transformers 4 and others read `rope_theta`, which 5 does not write; without it they silently take 10,000."""
    rope = json.loads(path.read_text(encoding="utf-8")).get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = (
            None
            if rope.get("rope_type", "default") == "default"
            else {k: v for k, v in rope.items() if k != "rope_theta"}
        )
        edit_json(path, {"rope_theta": rope["rope_theta"], "rope_scaling": scaling})
