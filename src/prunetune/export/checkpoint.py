"""Write a cut model as a checkpoint that stock runtimes open: uniform (a plain architecture) or per-layer.

Which widths a stock class accepts is asked before training, so that no run ends with a checkpoint that cannot be
written.
"""

import copy
import functools
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunetune.errors import ModelError, PlanError
from prunetune.model.checksums import write_checksums
from prunetune.model.per_layer_code import PerLayerNames, build_meta_model, per_layer_overrides, write_code
from prunetune.model.provenance import HISTORY_FILE, PruningRun
from prunetune.plan import Plan
from prunetune.pruning.families import MODEL_TYPE_PREFIX, get_family, head_counts, num_experts_key
from prunetune.pruning.sites import find_sites
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
            names, size = PerLayerNames.from_model(model), getattr(config, "hidden_size", 0)
            # Llama saves no hidden size that its heads do not divide: the one that channels left is written below.
            if not is_per_layer and size:
                model.config.hidden_size += -size % model.config.num_attention_heads
            # Tensor names as in memory: transformers renames on loading by model_type, and does not know this one.
            _save(model, partial, shards, save_original_format=False)
            if size and model.config.hidden_size != size:
                model.config.hidden_size = size
                edit_json(partial / "config.json", {"hidden_size": size})
            edit_json(partial / "config.json", per_layer_overrides(plan, sites, model.config) | names.auto_map())
            write_code(partial)
        add_old_rope_keys(partial / "config.json")
        if end_token is not None:
            file = partial / "generation_config.json"
            stored = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            tokens = stored if isinstance(stored, list) else [tokenizer.eos_token_id if stored is None else stored]
            if end_token not in tokens:
                edit_json(file, {"eos_token_id": [*(token for token in tokens if token is not None), end_token]})
        tokenizer.save_pretrained(partial)
        for file in processor_files:
            shutil.copyfile(file, partial / file.name)
        (partial / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (partial / "README.md").write_text(card, encoding="utf-8")
        if history:
            (partial / HISTORY_FILE).write_text(
                json.dumps([asdict(run) for run in history], indent=2) + "\n", encoding="utf-8"
            )
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


def add_old_rope_keys(path: Path) -> None:
    """Write `rope_theta` and `rope_scaling`, which transformers 4 and others read and transformers 5 does not write.

    Without them they silently use a `rope_theta` of 10,000.
    """
    rope = json.loads(path.read_text(encoding="utf-8")).get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaled = rope.get("rope_type", "default") != "default"
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None
        edit_json(path, {"rope_theta": rope["rope_theta"], "rope_scaling": scaling})


def kv_groups_validator(config: Any) -> Callable[..., bool]:
    """A function that says whether a uniform model of this architecture may keep `(kv_groups, queries_per_kv_head)`.

    It builds a model without weights of that shape, and compares the width of its heads with the dense model's: some
    classes demand a hidden size that the heads divide, others derive the head dimension from it. Answers are cached.
    """
    heads = head_counts(config)

    @functools.cache
    def is_valid(kv_groups: int, queries_per_kv_head: int = heads.queries_per_kv_head) -> bool:
        if (kv_groups, queries_per_kv_head) == (heads.kv_heads, heads.queries_per_kv_head) or kv_groups < 1:
            return kv_groups >= 1
        try:
            model = build_meta_model(shrink_config(config, kv_groups, None, queries_per_kv_head=queries_per_kv_head))
            site = next((site for site in find_sites(model) if site.kind is UnitKind.KV_GROUP), None)
        except Exception:  # each class refuses in its own way
            return False
        if site is None or site.consumer is None:  # attention cannot be pruned
            return False
        return (site.units, site.consumer.rows_per_unit) == (kv_groups, queries_per_kv_head * heads.head_dim)

    return is_valid


def shrink_config(
    config: Any,
    kv_groups: int | None,
    mlp_channels: int | None,
    *,
    queries_per_kv_head: int | None = None,
    experts: int | None = None,
    expert_channels: int | None = None,
) -> Any:
    """The configuration with smaller, equal layers; None keeps a width.

    If the family's own class cannot carry the head count, the configuration is that of its `EquivalentFamily`.
    """
    from transformers import CONFIG_MAPPING

    if (text := config.get_text_config()) is not config:  # inside a multimodal model
        wrapper = copy.deepcopy(config)
        wrapper.text_config = shrink_config(
            text,
            kv_groups,
            mlp_channels,
            queries_per_kv_head=queries_per_kv_head,
            experts=experts,
            expert_channels=expert_channels,
        )
        return wrapper
    values, dense = config.to_dict(), head_counts(config)
    kv_heads = dense.kv_heads if kv_groups is None else kv_groups
    heads = kv_heads * (queries_per_kv_head or dense.queries_per_kv_head)
    values.pop("transformers_version", None)
    if kv_groups is not None or queries_per_kv_head is not None:
        values |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dense.head_dim}
    if experts is not None:
        values[num_experts_key(config)] = experts
    if expert_channels is not None:
        values[get_family(config).mixture.intermediate_size_key] = expert_channels  # type: ignore[union-attr]
    if mlp_channels is not None:
        values[mlp_width_option(config)] = mlp_channels
    equivalent = EQUIVALENT_FAMILIES.get(config.model_type)
    if equivalent is None or not equivalent.is_needed(config, heads, dense.head_dim):
        return type(config).from_dict(values | {"architectures": [_causal_class(config)]})
    shared = {name: value for name, value in values.items() if name not in equivalent.removed_options}
    shared |= {"model_type": equivalent.model_type, **equivalent.values}
    changed = CONFIG_MAPPING[equivalent.model_type].from_dict(shared)
    changed.architectures = [_causal_class(changed)]
    return changed


@dataclass(frozen=True)
class EquivalentFamily:
    """A family with the same tensors and arithmetic, for head counts that a family's own configuration cannot carry."""

    model_type: str
    is_needed: Callable[[Any, int, int], bool]  # configuration, query heads, head dimension
    reason: str  # why the family's own configuration cannot, for `explain_family_change`
    removed_options: tuple[str, ...]  # options of the family that this one lacks
    values: Mapping[str, Any]  # options that this one adds


EQUIVALENT_FAMILIES: Mapping[str, EquivalentFamily] = {
    "llama": EquivalentFamily(
        model_type="mistral",
        # Mistral has no biases.
        is_needed=lambda config, heads, _: (
            config.hidden_size % heads and not (config.attention_bias or config.mlp_bias)
        ),
        reason="refuses {heads} heads at hidden size {hidden}",
        removed_options=("attention_bias", "mlp_bias", "pretraining_tp"),
        values={"sliding_window": None},
    ),
    "qwen2": EquivalentFamily(
        model_type="seed_oss",
        is_needed=lambda config, heads, dim: heads * dim != config.hidden_size and not config.use_sliding_window,
        reason="means heads of {hidden} / {heads} in vLLM, llama.cpp and mlx-lm, and these have {size} rows",
        removed_options=("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
        values={"attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
}


def explain_family_change(config: Any, written: Any) -> str:
    """Why the written configuration has another class than the dense one; "" if it has the same."""
    if type(config) is type(written):
        return ""
    heads = head_counts(written)
    reason = EQUIVALENT_FAMILIES[config.model_type].reason.format(
        heads=heads.query_heads, size=heads.head_dim, hidden=config.hidden_size
    )
    return (
        f"written as {written.architectures[0]}: {type(config).__name__} {reason}; tensors and arithmetic are the same"
    )


def mlp_width_option(config: Any) -> str:
    """The configuration's option for the width of the MLP; raises `PlanError` if it has none."""
    option = get_family(config).intermediate_size_key
    if not option:
        raise PlanError(f"{config.model_type} has no option for the width of an MLP: use layout per-layer")
    return option


def _causal_class(config: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)  # type: ignore[no-any-return]
