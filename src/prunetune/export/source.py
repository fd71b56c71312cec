"""The model to export: a finished run's, or a model folder that prunetune wrote; opened, checked, read on demand."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from prunetune.config.yaml_file import read_yaml
from prunetune.errors import ModelError, PlanError
from prunetune.export.checkpoint import edit_json
from prunetune.model.checksums import CHECKSUM_FILE, verify_checksums
from prunetune.model.config_checks import auto_class, check_config_values
from prunetune.model.per_layer_classes import register_folder
from prunetune.model.per_layer_code import PerLayerNames, build_meta_model, dense_config, width_option_names, write_code
from prunetune.model.reduced_vocabulary import reduced_model_of
from prunetune.model.safetensors_reader import SafetensorsReader, safetensors_files
from prunetune.plan import Plan
from prunetune.pruning.families import get_family, head_counts
from prunetune.pruning.linears import COLUMNS, stored_axis
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import Site, UnitKind
from prunetune.utils.failures import reading_model_files
from prunetune.utils.untrusted import parse_json, read_text

log = logging.getLogger(__name__)
Layout = Literal["uniform", "per-layer"]
PROBE_LENGTH = 32  # tokens in a row of a self-check


@dataclass(frozen=True)
class ExportSource:
    """A finished model folder. Configuration, tokenizer and weights are read when they are first used."""

    folder: Path  # config.json, *.safetensors, the tokenizer
    run: Path | None  # the run folder that holds it
    base: str  # the base model in the run's recipe, or with the tokens that the run keeps; "" if unknown
    trust_remote_code: bool = False  # for a tokenizer with code of its own

    @classmethod
    def open(cls, path: Path, *, trust_remote_code: bool = False) -> ExportSource:
        """Open a run folder or a model folder, and check files, architecture, widths and checksums, in this order.

        Raises `ModelError` or `PlanError` if a part is missing, damaged or of another model.
        """
        recipe = path / "config.yaml"
        if recipe.is_file():
            sizes = sorted((str(model.parent) for model in path.glob("sizes/*/model")), reverse=True)
            if sizes:
                raise ModelError(f"{path}: the run has several sizes: export one of {', '.join(sizes)}")
            if not (path / "model").is_dir():
                raise ModelError(
                    f"{path}: the run is not finished (no model/): continue it with `prunetune run --resume`"
                )
            values = read_yaml(recipe, "this run's recipe", "put it back, or name another run") or {}
            base = str(reduced_model_of(path) or values.get("model", ""))
            source = cls(path / "model", path, base, trust_remote_code)
        elif (path / "config.json").is_file():
            source = cls(path, None, "", trust_remote_code)
        else:
            raise ModelError(f"{path} is no run folder (no config.yaml) and no model folder (no config.json)")
        folder = source.folder
        if missing := [file.name for file in safetensors_files(folder) if not file.is_file()]:
            raise ModelError(f"{folder}: {missing[0]} is missing; copy the folder again, or write the model again")
        try:
            if not source.tensor_files:
                raise ModelError(f"{folder} holds no weights (*.safetensors); copy the folder again")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder}: a .safetensors file is not whole ({error}); copy the folder again") from error
        if (folder / "adapter_config.json").exists():  # which names a folder or hub model to open instead
            raise ModelError(f"{folder} holds an adapter, and export needs whole weights: merge it into its model")
        get_family(source.config)  # raises for an unknown architecture
        _check_widths(source)
        if not verify_checksums(folder):
            log.info("%s has no %s: its files are not verified", folder, CHECKSUM_FILE)
        return source

    @property
    def name(self) -> str:
        """The name of the run or model folder, from which exports take theirs."""
        return (self.run or self.folder).absolute().name

    @cached_property
    def config_json(self) -> dict[str, Any]:
        """The content of config.json."""
        try:
            values = parse_json(read_text(self.folder / "config.json"), nan=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder}/config.json cannot be read: {error}; write the model again") from error
        if not isinstance(values, dict) or "model_type" not in values:
            raise ModelError(f"{self.folder}/config.json names no model_type; it is not a model's configuration")
        return values

    @property
    def layout(self) -> Layout:
        """`uniform`: a stock class opens it; `per-layer`: its layers differ in width."""
        return "per-layer" if "per_layer_config" in self.config_json else "uniform"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights."""
        check_config_values(str(self.folder), self.config_json, trust_remote_code=self.trust_remote_code)
        name = self.config_json.get("dtype") or self.config_json.get("torch_dtype") or "float32"
        return getattr(torch, str(name))  # type: ignore[no-any-return]

    @cached_property
    def config(self) -> Any:
        """The stock class's configuration; of a per-layer model the dense one, see `layer_widths` for its layers."""
        config = dense_config(self.config_json, self.folder)
        if getattr(config, "tie_word_embeddings", False):  # transformers 5 goes by the files, other runtimes by this
            config.tie_word_embeddings = not self.stored.has_own_head("lm_head.weight", "model.embed_tokens.weight")
        return config

    @cached_property
    def layer_widths(self) -> tuple[LayerWidths, ...]:
        """The heads and MLP channels of each layer."""
        heads, mlp_option = head_counts(self.config), width_option_names(self.config)["mlp"]
        dense = LayerWidths(heads.query_heads, heads.kv_heads, getattr(self.config.get_text_config(), mlp_option, 0))
        per_layer = self.config_json.get("per_layer_config") or {}
        widths = []
        for index in range(self.config.get_text_config().num_hidden_layers):
            layer = per_layer.get(f"{index:02d}", {})
            skipped = layer.get("skip", ())
            query_heads, kv_heads, mlp_channels = 0, 0, 0
            if "attention" not in skipped:
                query_heads = layer.get("num_attention_heads", dense.query_heads)
                kv_heads = layer.get("num_key_value_heads", dense.kv_heads)
            if "mlp" not in skipped:
                mlp_channels = layer.get(mlp_option, dense.mlp_channels)
            widths.append(LayerWidths(query_heads, kv_heads, mlp_channels))
        return tuple(widths)

    @cached_property
    def meta_model(self) -> Any:
        """The model of `config` without weights (for a per-layer model: the dense one)."""
        with reading_model_files(f"{self.folder}: config.json", "write the model again"):
            return build_meta_model(self.config)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The KV groups and MLP channels of `meta_model`."""
        return find_sites(self.meta_model)

    @cached_property
    def plan(self) -> Plan | None:
        """The plan that the model was cut by, if the folder has a plan.json."""
        file = self.folder / "plan.json"
        return Plan.load(file) if file.is_file() else None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the folder; raises `ModelError` if it cannot be read."""
        from transformers import AutoTokenizer

        trust = self.trust_remote_code
        with reading_model_files(f"{self.folder}: no tokenizer found", "save it into the folder"):
            return AutoTokenizer.from_pretrained(self.folder, config=self.config, trust_remote_code=trust)

    def load_model(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """Open the model by a stock class or a per-layer class of this package, in `dtype` on the CPU.

        `options` are passed to `from_pretrained`.

        Without options its parameters are frozen. Raises `ModelError` if it does not open.
        """
        log.info("loading %s: %.1f M parameters", self.folder, self.params / 1e6)
        register_folder(self.folder)
        with reading_model_files(f"{self.folder} cannot be opened", "write the model again"):
            loaded = auto_class(self.config).from_pretrained(
                self.folder, dtype=dtype, trust_remote_code=False, **options
            )
        return (loaded if options else loaded.requires_grad_(False)).eval()

    @cached_property
    def stored(self) -> SafetensorsReader:
        """The tensors of the folder."""
        return SafetensorsReader.from_files(safetensors_files(self.folder))

    @property
    def tensor_files(self) -> dict[str, Path]:
        """Tensor name -> the .safetensors file that holds it."""
        return self.stored.files

    def copy_other_files(self, path: Path) -> None:
        """Copy all but weights to an export of the same layout; the modules of a per-layer model are written anew."""
        weights = (".safetensors", ".safetensors.index.json")
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and not file.name.endswith((*weights, ".py")) and not (path / file.name).exists():
                shutil.copyfile(file, path / file.name)
        if self.layout == "per-layer":
            names = PerLayerNames.from_model(self.meta_model)
            edit_json(path / "config.json", names.auto_map())
            write_code(path)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor, without reading it."""
        with safe_open(self.tensor_files[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """A stored tensor, mapped from its file: it takes memory only while it is used."""
        return self.stored.tensor(name)

    def iter_rows(self, name: str, max_rows: int) -> Iterator[torch.Tensor]:
        """A stored tensor in blocks of at most `max_rows` rows.

        The file is opened for every block, as mapped pages count as memory until it is closed.
        """
        for start in range(0, self.shape(name)[0], max_rows):
            with safe_open(self.tensor_files[name], framework="pt") as tensors:
                yield tensors.get_slice(name)[start : start + max_rows]

    @property
    def params(self) -> int:
        """The number of stored parameters; tied ones count once."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.tensor_files)

    def probe_tokens(self) -> torch.Tensor:
        """[2, 32] token ids for a self-check: spread over the vocabulary, always the same."""
        rng = torch.Generator().manual_seed(0)
        return torch.randint(self.config.get_text_config().vocab_size, (2, PROBE_LENGTH), generator=rng)


@dataclass(frozen=True)
class LayerWidths:
    """The widths of one layer; 0 if the layer skips attention or the MLP."""

    query_heads: int
    kv_heads: int
    mlp_channels: int


def _check_widths(source: ExportSource) -> None:
    """Check that plan.json, config.json and the tensors have the same widths."""
    heads = head_counts(source.config)
    plan_widths = source.plan.widths() if source.plan else {}
    if any(":" in name for name in plan_widths):  # of blocks, layers or experts, which `source.sites` does not have
        plan_widths = {}
    is_of_another_model = bool(plan_widths) and not any(site.name in plan_widths for site in source.sites)
    for site in source.sites:
        layer = source.layer_widths[site.layer]
        if site.kind is UnitKind.KV_GROUP:
            units, columns = layer.kv_heads, layer.query_heads * heads.head_dim
        else:
            units = columns = layer.mlp_channels
        # A run that prunes other kinds, or a model that has lost this block before, has no such site.
        if plan_widths.get(site.name, units) != units or is_of_another_model:
            raise PlanError(
                f"{source.folder}/plan.json keeps {plan_widths.get(site.name, 'no')} units at {site.name} and "
                f"config.json says {units}: the plan is of another model; put back the plan.json of this one"
            )
        module = site.consumer.module if site.consumer else ""
        name, axis = f"{module}.weight", stored_axis(source.meta_model.get_submodule(module), COLUMNS)
        stored_columns = source.shape(name)[axis] if name in source.tensor_files else columns
        if stored_columns != columns:
            raise ModelError(
                f"{source.folder}: {name} has {stored_columns} columns and config.json asks for {columns}: "
                "weights and configuration do not belong together; copy them again"
            )
