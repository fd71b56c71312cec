"""Write a cut model as a checkpoint that stock runtimes open: uniform (a plain architecture) or per-layer."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.checksums import write_checksums
from prunetune.export.per_layer import PerLayerNames, per_layer_overrides
from prunetune.export.per_layer_code import write_code
from prunetune.export.stock_config import build_meta_model, explain_family_change, shrink_config
from prunetune.plan import Plan
from prunetune.pruning.units import Site, effective_layout, surviving_layers
from prunetune.utils.files import atomic_folder


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A finished checkpoint."""

    folder: Path
    architecture: str  # class that opens it
    layout: str
    needs_code: bool  # opens with trust_remote_code only
    params: int
    bytes: int
    note: str = ""  # why another class than the original's


def write_checkpoint(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    sites: Sequence[Site],
    folder: Path,
    *,
    layout: str,
    card: str,
    shards: Path | None = None,
    end_token: int | None = None,
) -> WrittenCheckpoint:
    """Write `model`, already cut by `plan`, whole or not at all. Tensors keep their dtype.

    `end`: a token that ends an answer, beside those of the model's generation settings.
    Where a folder of finished `shards` is given, these are its weights, and `model` has none.
    """
    layout = effective_layout(layout, sites)
    config = uniform_config_from_plan(model.config, plan, sites) if layout == "uniform" else copy.deepcopy(model.config)
    with atomic_folder(folder) as partial:
        if layout == "uniform":
            target = build_meta_model(config)
            _assign_tensors(target, model)
            target.generation_config = model.generation_config
            _save(target, partial, shards)
        else:
            layered = PerLayerNames.from_model(model)
            # Names as in memory: renaming on the way in goes by model_type, and this one is of our own.
            _save(model, partial, shards, save_original_format=False)
            write_code(partial, layered, sites, model)
            edit_json(partial / "config.json", per_layer_overrides(plan, sites, model.config) | layered.auto_map())
        add_old_rope_keys(partial / "config.json")
        if end_token is not None:
            add_end_token(partial / "generation_config.json", end_token, tokenizer.eos_token_id)
        tokenizer.save_pretrained(partial)
        (partial / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        write_checksums(partial)
    files = list(folder.rglob("*.safetensors"))
    return WrittenCheckpoint(
        folder=folder,
        architecture=config.architectures[0] if layout == "uniform" else PerLayerNames.from_model(model).model_class,
        layout=layout,
        needs_code=layout != "uniform",
        params=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(path.stat().st_size for path in files),
        note=explain_family_change(model.config, config),
    )


def uniform_config_from_plan(config: Any, plan: Plan, sites: Sequence[Site]) -> Any:
    """The configuration of a uniform plan; raises `ModelError` where its layers differ."""
    widths: dict[str, set[int]] = {}
    left = set(surviving_layers(plan, sites))
    for site in sites:
        if site.layer in left and site.kind != "layers":
            lanes = (
                len({unit // site.units_per_group for unit in plan.kept[site.name]}) if site.parent_groups > 1 else 1
            )
            widths.setdefault(site.kind, set()).add(len(plan.kept[site.name]) // max(1, lanes))
    if any(len(width) > 1 or 0 in width for width in widths.values()):
        raise ModelError(f"plan has widths {widths} and layout uniform needs one of each kind: write it per-layer")
    found = {kind: next(iter(width)) for kind, width in widths.items()}
    return shrink_config(
        config,
        found.get("attention"),
        found.get("mlp"),
        queries_per_kv_head=found.get("query-heads"),
        experts=found.get("experts"),
        expert_channels=found.get("expert-channels"),
    )


def _assign_tensors(target: Any, model: Any) -> None:
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


def add_end_token(path: Path, end_token: int, end_of_text: int | None) -> None:
    """Have whoever serves the checkpoint stop at `end` too, after what is named already, else the end of text."""
    named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    known = named if isinstance(named, list) else [end_of_text if named is None else named]
    if end_token not in known:
        edit_json(path, {"eos_token_id": [*(token for token in known if token is not None), end_token]})


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
