"""Write a cut model as a checkpoint that stock runtimes open: uniform (a plain architecture) or per-layer."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.stock_config import explain_family_change, shrink_config
from prunetune.model.checksums import write_checksums
from prunetune.model.history import HISTORY_FILE, PruningRun, format_history
from prunetune.model.per_layer_code import build_meta_model, write_code
from prunetune.model.per_layer_config import PerLayerNames, per_layer_overrides
from prunetune.plan import Plan
from prunetune.pruning.families import MODEL_TYPE_PREFIX
from prunetune.pruning.units import Site, UnitKind, effective_layout, surviving_layers
from prunetune.utils.files import atomic_folder


@dataclass(frozen=True)
class WrittenCheckpoint:
    """A written checkpoint: where it is, and how it opens."""

    folder: Path
    architecture: str  # the class that opens it
    layout: str
    needs_code: bool  # opens only with trust_remote_code
    params: int
    bytes: int
    note: str = ""  # why its class is not the original's


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
    processor_files: Sequence[Path] = (),
    history: Sequence[PruningRun] = (),
) -> WrittenCheckpoint:
    """Write `model`, already cut by `plan`, completely or not at all. Tensors keep their dtype.

    `end_token`: a token that ends an answer, added to those of the model's generation settings.
    `processor_files`: of a multimodal model, copied as they are.
    `history`: the runs that pruned the model, this one last.
    `shards`: a folder of finished weight files, which are moved into the checkpoint; `model` then has no weights.
    """
    is_per_layer = model.config.model_type.startswith(MODEL_TYPE_PREFIX)
    layout = "per-layer" if is_per_layer else effective_layout(layout, sites)
    config = uniform_config_from_plan(model.config, plan, sites) if layout == "uniform" else copy.deepcopy(model.config)
    with atomic_folder(folder) as partial:
        if layout == "uniform":
            target = build_meta_model(config)
            # A name or shape that does not fit the configuration fails here, before a file exists.
            target.load_state_dict(model.state_dict(), assign=True)
            target.tie_weights()
            target.generation_config = model.generation_config
            _save(target, partial, shards)
        else:
            names = PerLayerNames.from_model(model)
            # Tensor names as in memory: transformers renames on loading by model_type, and does not know this one.
            _save(model, partial, shards, save_original_format=False)
            edit_json(partial / "config.json", per_layer_overrides(plan, sites, model.config) | names.auto_map())
            write_code(partial)
        add_old_rope_keys(partial / "config.json")
        if end_token is not None:
            add_end_token(partial / "generation_config.json", end_token, tokenizer.eos_token_id)
        tokenizer.save_pretrained(partial)
        for file in processor_files:
            shutil.copyfile(file, partial / file.name)
        (partial / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        if history:
            (partial / HISTORY_FILE).write_text(format_history(history), encoding="utf-8")
        write_checksums(partial)
    files = list(folder.rglob("*.safetensors"))
    return WrittenCheckpoint(
        folder=folder,
        architecture=type(target).__name__ if layout == "uniform" else PerLayerNames.from_model(model).model_class,
        layout=layout,
        needs_code=layout != "uniform",
        params=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(path.stat().st_size for path in files),
        note=explain_family_change(model.config, config),
    )


def uniform_config_from_plan(config: Any, plan: Plan, sites: Sequence[Site]) -> Any:
    """The configuration of a plan whose layers all keep the same widths; raises `ModelError` if they differ."""
    widths_by_kind: dict[str, set[int]] = {}
    layers = set(surviving_layers(plan, sites))
    for site in sites:
        if site.layer in layers and site.kind is not UnitKind.LAYER:
            kept = plan.kept[site.name]
            parents = len({unit // site.units_per_group for unit in kept}) if site.parent_groups > 1 else 1
            widths_by_kind.setdefault(str(site.kind), set()).add(len(kept) // max(1, parents))
    if any(len(widths) > 1 or 0 in widths for widths in widths_by_kind.values()):
        raise ModelError(
            f"the plan has widths {widths_by_kind}, and layout uniform needs one width of each kind: write it per-layer"
        )
    width = {kind: next(iter(widths)) for kind, widths in widths_by_kind.items()}
    return shrink_config(
        config,
        width.get("attention"),
        width.get("mlp"),
        queries_per_kv_head=width.get("query-heads"),
        experts=width.get("experts"),
        expert_channels=width.get("expert-channels"),
    )


def _save(model: Any, folder: Path, shards: Path | None, **options: Any) -> None:
    """`save_pretrained`, or for a model without weights the same files with finished shards."""
    if shards is None:
        model.save_pretrained(folder, **options)
        return
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    for file in sorted(shards.iterdir()):
        file.rename(folder / file.name)
    shards.rmdir()


def edit_json(path: Path, changes: dict[str, Any], *, without: Collection[str] = ()) -> None:
    """Change values of a JSON file, and remove the keys in `without`."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    values = {key: value for key, value in values.items() if key not in without}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_end_token(path: Path, end_token: int, end_of_text: int | None) -> None:
    """Add `end_token` to generation_config.json's `eos_token_id`, after its tokens or, without any, the end of text."""
    stored = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    tokens = stored if isinstance(stored, list) else [end_of_text if stored is None else stored]
    if end_token not in tokens:
        edit_json(path, {"eos_token_id": [*(token for token in tokens if token is not None), end_token]})


def add_old_rope_keys(path: Path) -> None:
    """Write `rope_theta` and `rope_scaling`, which transformers 4 and others read and transformers 5 does not write.

    Without them they silently use a `rope_theta` of 10,000.
    """
    rope = json.loads(path.read_text(encoding="utf-8")).get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaled = rope.get("rope_type", "default") != "default"
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None
        edit_json(path, {"rope_theta": rope["rope_theta"], "rope_scaling": scaling})
