"""What is exported: a finished run's model, or a model folder that prunetune wrote, opened and looked over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from prunetune.config.yaml_file import read_yaml
from prunetune.errors import ModelError
from prunetune.export.per_layer import width_option_names
from prunetune.export.source_checks import check_source
from prunetune.export.stock_config import build_meta_model
from prunetune.plan import Plan
from prunetune.pruning.families import head_counts
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site

Layout = Literal["uniform", "per-layer"]
# Not of the stock class: the per-layer schema, and rotary keys that only older releases read.
NON_STOCK_KEYS = ("per_layer_config", "auto_map", "architectures", "transformers_version", "rope_theta", "rope_scaling")
PROBE = 32  # ids of a self-check's row


@dataclass(frozen=True)
class ExportSource:
    """A finished model folder: what an exporter may ask. Weights, tokenizer and configuration are read on demand."""

    folder: Path  # config.json, *.safetensors, the tokenizer
    run: Path | None  # the run folder around it
    base: str  # what the run's recipe calls the model that it began with; "" where unknown
    trust_remote_code: bool = False  # for a per-layer folder that no run folder is around

    @classmethod
    def open(cls, path: Path, *, trust_remote_code: bool = False) -> ExportSource:
        """A run folder or a model folder; raises `ModelError` or `PlanError` where a part is missing or odd."""
        recipe = path / "config.yaml"
        if recipe.is_file():
            sizes = sorted((str(model.parent) for model in path.glob("sizes/*/model")), reverse=True)
            if sizes:
                raise ModelError(f"{path}: the run has several sizes: export one of {', '.join(sizes)}")
            if not (path / "model").is_dir():
                raise ModelError(f"{path}: the run is not finished (no model/): go on with `prunetune run --resume`")
            values = read_yaml(recipe, "this run's recipe", "put it back, or name another run") or {}
            source = cls(path / "model", path, str(values.get("model", "")))
        elif (path / "config.json").is_file():
            source = cls(path, None, "", trust_remote_code)
        else:
            raise ModelError(f"{path} is no run folder (no config.yaml) and no model folder (no config.json)")
        check_source(source)
        return source

    @property
    def name(self) -> str:
        """What files made of it are called."""
        return (self.run or self.folder).absolute().name

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """config.json as it stands."""
        try:
            found = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as broken:
            raise ModelError(f"{self.folder}/config.json cannot be read: {broken}; write the model again") from broken
        if not isinstance(found, dict) or "model_type" not in found:
            raise ModelError(f"{self.folder}/config.json names no model_type; it is not a model's configuration")
        return found

    @property
    def layout(self) -> Layout:
        """uniform: a stock class opens it; per-layer: its layers differ in width."""
        return "per-layer" if "per_layer_config" in self.config_json else "uniform"

    @property
    def dtype(self) -> torch.dtype:
        """How the weights are stored."""
        name = self.config_json.get("dtype") or self.config_json.get("torch_dtype") or "float32"
        return getattr(torch, str(name))  # type: ignore[no-any-return]

    @cached_property
    def config(self) -> Any:
        """The stock class's configuration; of a per-layer model the dense one, for `widths` tells the rest."""
        from transformers import CONFIG_MAPPING

        family = self.config_json["model_type"].removeprefix("pruned_")
        if family not in CONFIG_MAPPING:
            raise ModelError(f"{self.folder}: {family} is no architecture of transformers; export needs one that is")
        values = {key: value for key, value in self.config_json.items() if key not in NON_STOCK_KEYS}
        try:
            return CONFIG_MAPPING[family].from_dict(values | {"model_type": family})
        except (ValueError, TypeError, KeyError) as wrong:
            reason = " ".join(str(wrong).split())
            raise ModelError(f"{self.folder}/config.json does not fit {family}: {reason}") from wrong

    @cached_property
    def layer_widths(self) -> tuple[LayerWidths, ...]:
        """What each layer keeps."""
        heads, name = head_counts(self.config), width_option_names(self.config)["mlp"]
        whole = {name: getattr(self.config, name, 0), "num_attention_heads": heads.query_heads}
        whole |= {"num_key_value_heads": heads.kv_heads}
        own = self.config_json.get("per_layer_config") or {}
        layers = (whole | own.get(f"{index:02d}", {}) for index in range(self.config.num_hidden_layers))
        return tuple(_layer_widths(layer, name) for layer in layers)

    @cached_property
    def meta_model(self) -> Any:
        """The stock configuration's model without weights (of a per-layer model: the dense one)."""
        return build_meta_model(self.config)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """KV groups and MLP channels of the skeleton."""
        return find_sites(self.meta_model)

    @cached_property
    def plan(self) -> Plan | None:
        """The units that were kept, where the folder says."""
        file = self.folder / "plan.json"
        return Plan.load(file) if file.is_file() else None

    @cached_property
    def tokenizer(self) -> Any:
        """As saved beside the model."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, config=self.config)
        except (OSError, ValueError, KeyError) as broken:
            reason = " ".join(str(broken).split())
            raise ModelError(f"{self.folder}: no tokenizer found: {reason}; save it into the folder") from broken

    def load_model(self, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
        """The model, opened as its user would, in `dtype` on the CPU; `how` goes to `from_pretrained`."""
        from transformers import AutoModelForCausalLM

        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, trust_remote_code=self.trusts_code, **how
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as broken:
            reason = (str(broken).strip().splitlines() or [type(broken).__name__])[0]
            raise ModelError(f"{self.folder} cannot be opened: {reason}; write the model again") from broken
        return (loaded if how else loaded.requires_grad_(False)).eval()

    @property
    def trusts_code(self) -> bool:
        """Whether the folder's own modules may run: of a run folder they were generated here."""
        return self.layout == "per-layer" and (self.run is not None or self.trust_remote_code)

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """Tensor name -> the .safetensors file that holds it."""
        found: dict[str, Path] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a stored tensor, without reading it."""
        with safe_open(self.tensor_files[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """One stored tensor, mapped from its file: memory is taken only while it is used."""
        with safe_open(self.tensor_files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)  # type: ignore[no-any-return]

    def iter_rows(self, name: str, max_rows: int) -> Iterator[torch.Tensor]:
        """The same, so many rows at a time: mapped pages of a large tensor would count as memory until it is let go."""
        for start in range(0, self.shape(name)[0], max_rows):
            with safe_open(self.tensor_files[name], framework="pt") as tensors:
                yield tensors.get_slice(name)[start : start + max_rows]

    @property
    def params(self) -> int:
        """Stored parameters; tied ones count once."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.tensor_files)

    def probe_tokens(self) -> torch.Tensor:
        """[2, 32] ids for a self-check: spread over the vocabulary, always the same."""
        rng = torch.Generator().manual_seed(0)
        return torch.randint(self.config.vocab_size, (2, PROBE), generator=rng)


@dataclass(frozen=True)
class LayerWidths:
    """What one layer keeps."""

    query_heads: int  # query heads; 0: the layer skips attention
    kv_heads: int  # key-value heads
    mlp_channels: int  # of the MLP


def _layer_widths(layer: dict[str, Any], channels: str) -> LayerWidths:
    skipped = layer.get("skip", ())
    queries, groups = (layer[f"num_{name}_heads"] for name in ("attention", "key_value"))
    return LayerWidths(
        0 if "attention" in skipped else queries,
        0 if "attention" in skipped else groups,
        0 if "mlp" in skipped else layer[channels],
    )
