"""All that is decided before training: opened, checked, and refused where it cannot work; nothing is written here."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from prunetune.bench.latency.tables import get_latency_table
from prunetune.config.recipe import RunConfig
from prunetune.cost.layer_shapes import model_shape
from prunetune.cost.limits import TIMED_BUDGETS, make_budget_limits
from prunetune.cost.parameters import prunable_params
from prunetune.cost.training_memory import TrainingMemory, estimate_memory, training_setup, training_shapes
from prunetune.data.encoding import EncodedExamples, encode
from prunetune.data.sources import SplitName
from prunetune.data.splits import Splits, load_splits
from prunetune.errors import ConfigError, DataError, ModelError, RunFolderError
from prunetune.evaluation.score_records import context_length
from prunetune.export.stock_config import kv_groups_validator, mlp_width_option
from prunetune.manifest import DataFacts, DenseModelFacts
from prunetune.model.loading import (
    LoadedModel,
    load_meta_model,
    load_model_and_tokenizer,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from prunetune.pipeline.budget_preview import budget_usage_lines
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear
from prunetune.pruning.nf4 import quantize_linears_to_nf4, require_nf4
from prunetune.pruning.sites import Site, find_sites, lora_target_modules, unprunable_params
from prunetune.runs.folder import CHANGEABLE_ON_RESUME, RunFolder, check_folder
from prunetune.search.feasibility import uniform_scores, with_limits
from prunetune.search.plan_rules import EXPERT_ROW_ALIGN
from prunetune.search.select import PlanConstraints, default_align, select
from prunetune.train.adapters import trains_all_weights
from prunetune.train.job import Observer
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks
from prunetune.train.teacher import resolve_auto
from prunetune.utils.files import require_disk_space

log = logging.getLogger(__name__)


class Console(Observer, Protocol):
    """Hears of stages as well as of steps."""

    def stage(self, name: str, total: int) -> None:
        """A stage of so many steps begins."""

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        """An evaluation has come so far."""

    def close(self) -> None:
        """Nothing more will come."""


@dataclass(frozen=True)
class RunContext:
    """All that is decided before training: nothing in it changes afterwards."""

    config: RunConfig
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype
    sites: tuple[Site, ...]
    constraints: PlanConstraints
    tokenizer: Any
    splits: Splits
    encoded: Mapping[SplitName, EncodedExamples]
    console: Console
    dense_params: int  # of the dense model
    unprunable_block_params: (
        int  # of them in decoder layers, where a kind of block stays whole; so that what is removed is a share of both
    )
    ranks: Ranks = SINGLE_PROCESS

    def load_dense(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LoadedModel:
        """The dense model, anew."""
        trust = self.config.trust_remote_code
        return load_model_and_tokenizer(
            self.config.model, device=device or self.device, dtype=dtype or self.dtype, trust_remote_code=trust
        )

    def load_for_training(self) -> Any:
        """The dense model anew for the loop: its linears in 4 bits where `lora.quantize` says so.

        Where it will be sharded, it is in rank 0's memory, and on others its structure.
        """
        if self.ranks.uses_fsdp and not self.ranks.is_main:
            trust = self.config.trust_remote_code
            return load_meta_model(self.config.model, trust_remote_code=trust).eval().requires_grad_(False)
        if not self.ranks.uses_fsdp and self.config.lora.quantize == "off":
            return self.load_dense().model
        model = self.load_dense(device=torch.device("cpu")).model  # the device holds no dense linear but one at a time
        if self.ranks.uses_fsdp:
            return model
        quantize_linears_to_nf4(model, self.sites, dtype=self.dtype, device=self.device)
        return model.to(self.device)


def prepare(
    config: RunConfig,
    *,
    resume: bool,
    console: Console,
    changeable: Collection[str] = CHANGEABLE_ON_RESUME,
    ranks: Ranks = SINGLE_PROCESS,
) -> RunContext:
    """Open everything and refuse what cannot work; writes nothing. A resumed run may change what is in `free`."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # every stage has a line or a bar of our own
    folder = check_folder(config, resume=resume, changeable=changeable)
    if config.lora.quantize != "off":
        require_nf4()
    device = pick_device(config.device) if ranks.world_size == 1 else ranks.device
    dtype = pick_dtype(config.dtype, device)
    console.stage("reading model and data", 0)
    splits = load_splits(config.data, config.seed)
    structure = load_meta_model(config.model, trust_remote_code=config.trust_remote_code)
    sites = find_sites(structure, config.budget.units)
    shape = make_plan_constraints(config, sites, structure.config)
    config, shape = apply_budgets(config, sites, shape, structure, device)
    for keep in config.budget.keeps:  # refuses in time
        select({site.name: torch.zeros(site.units) for site in sites}, sites, keep, shape)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if resume:
        _raise_if_data_changed(folder, splits)
    encoded = _encode_splits(splits, tokenizer, structure, config)
    params = sum(parameter.numel() for parameter in structure.parameters())
    whole = unprunable_params(structure, config.budget.units)
    if ranks.uses_fsdp and trains_all_weights(config.train, sites):
        raise ConfigError(
            "train.weights: sharded weights are frozen, and a model of this size is tuned in all of its weights: "
            "set train.weights to adapters, or launch without --use_fsdp"
        )
    if ranks.uses_fsdp and config.lora.quantize != "off":
        raise ConfigError("lora.quantize: a base in 4 bits is not sharded; leave it off, or launch without --use_fsdp")
    require_disk_space(folder.path, _disk_bytes_needed(structure, sites, config))
    log.info("model %s on %s in %s, layout %s", config.model, device, str(dtype).removeprefix("torch."), config.layout)
    if device.type == "cuda":
        longest = max((len(example.token_ids) for part in encoded.values() for example in part.examples), default=1)
        room = torch.cuda.get_device_properties(device).total_memory
        log_memory_estimate(estimate_peak_memory(structure, sites, config, dtype, longest=longest), room)
    return RunContext(
        config, folder, device, dtype, sites, shape, tokenizer, splits, encoded, console, params, whole, ranks
    )


def _encode_splits(
    splits: Splits, tokenizer: Any, meta_model: Any, config: RunConfig
) -> dict[SplitName, EncodedExamples]:
    """All splits as tokens; raises a `PrunetuneError` where a run could not use them."""
    context, rows = context_length(meta_model), getattr(meta_model.config.get_text_config(), "vocab_size", math.inf)
    encoded = {name: encode(records, tokenizer, config.data, context) for name, records in splits.by_name().items()}
    for name, part in encoded.items():
        if part.num_too_long:
            log.warning(
                "%s: %d examples are longer than the limit (longest %d tokens): data.too_long=%s",
                name,
                part.num_too_long,
                part.longest,
                config.data.too_long,
            )
        _raise_if_unusable(name, part, rows, config.model)
    return encoded


def _raise_if_unusable(name: SplitName, encoded: EncodedExamples, embedding_rows: float, model: str) -> None:
    if encoded.num_too_long and not encoded.examples and name in ("train", "search", "test"):
        raise DataError(
            f"no example of {name} fits the limit (longest {encoded.longest} tokens): raise data.max_length, "
            "or set data.too_long=truncate"
        )
    highest = max((max(example.token_ids, default=0) for example in encoded.examples), default=0)
    if highest >= embedding_rows:
        raise ModelError(
            f"model {model}: its tokenizer gives token {highest} ({name}), and its embedding has {embedding_rows} rows; "
            "resize it (model.resize_token_embeddings(len(tokenizer))) and save both"
        )


def _raise_if_data_changed(folder: RunFolder, splits: Splits) -> None:
    """A run goes on only with the rows it began with; raises `RunFolderError`."""
    before = folder.read_manifest().data.hashes
    changed = [name for name, digest in splits.hashes.items() if before.get(name, digest) != digest]
    if changed:
        raise RunFolderError(
            f"{folder.path}: the data of {', '.join(changed)} changed since the run began: "
            "put the old rows back, or start anew with another --out"
        )


def estimate_peak_memory(
    meta_model: Any, sites: tuple[Site, ...], config: RunConfig, dtype: torch.dtype, *, longest: int
) -> TrainingMemory:
    """The fuller of the two phases, see `budget.memory`; `longest`: tokens of the longest example."""
    shapes, config = training_shapes(meta_model, sites), resolve_auto(config, sites)
    setup = training_setup(config, dtype, longest=longest, all_weights=trains_all_weights(config.train, sites))
    return max(
        estimate_memory(shapes, setup, phase="search"),
        estimate_memory(shapes, setup, phase="tune"),
        key=lambda found: found.total,
    )


def log_memory_estimate(estimate: TrainingMemory, gpu_bytes: int) -> None:
    """What a run will hold of a GPU's `room`, in bytes; a warning where that is not enough."""
    parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in asdict(estimate).items() if value >= 5e7)
    log.info("memory: about %.1f GB of %.1f (%s)", estimate.total / 1e9, gpu_bytes / 1e9, parts)
    if estimate.total > gpu_bytes:
        log.warning(
            "memory: more than there is; passes are made smaller where they do not fit. Lower train.micro_tokens, "
            "set train.checkpointing on, distill.teacher base or none, or lora.quantize nf4"
        )


def apply_budgets(
    config: RunConfig, sites: tuple[Site, ...], constraints: PlanConstraints, meta_model: Any, device: torch.device
) -> tuple[RunConfig, PlanConstraints]:
    """Budgets beside `budget.keep` become part of the shape, and `budget.keep` the share that they leave about.

    Raises a `PrunetuneError` for one that cannot be met or measured.
    """
    amounts = config.budget.amounts()
    if not amounts:
        return config, constraints
    anatomy, workload = model_shape(meta_model, sites), config.workload
    table = None
    if any(kind in TIMED_BUDGETS for kind in amounts):
        table = get_latency_table(meta_model.config, sites, workload, device, constraints.align, config.budget.table)
    constraints = with_limits(
        constraints, sites, make_budget_limits(amounts, anatomy, workload, table), config.budget.keep
    )
    assert constraints.limits is not None
    for line in budget_usage_lines(
        constraints.limits, select(uniform_scores(sites), sites, constraints.limits.feasible_keep, constraints)
    ):
        log.info(line)
    return replace(config, budget=replace(config.budget, keep=constraints.limits.feasible_keep)), constraints


def with_distill_texts(context: RunContext, context_length: int) -> RunContext:
    """The setting with the texts that its recipe names now; the other splits stay as they are."""
    texts = load_splits(context.config.data, context.config.seed).texts
    encoded = {**context.encoded, "texts": encode(texts, context.tokenizer, context.config.data, context_length)}
    return replace(context, splits=replace(context.splits, texts=texts), encoded=encoded)


def make_plan_constraints(
    config: RunConfig, sites: tuple[Site, ...], model_config: Any, groups: Callable[[int], bool] | None = None
) -> PlanConstraints:
    """What a legal plan looks like for this model and layout; `groups`, where it is known which ones are legal."""
    budget = config.budget
    align, protected = budget.align or default_align(sites), budget.protected_layers()
    _raise_if_not_representable(config, sites, align, protected, model_config)
    return PlanConstraints(
        config.layout,
        align,
        budget.min_groups,
        groups or kv_groups_validator(model_config),
        min_share=budget.min_share,
        min_experts=budget.min_experts,
        min_queries=budget.min_queries,
        protected=protected,
        tensor_parallel=budget.tensor_parallel,
    )


def _raise_if_not_representable(
    config: RunConfig, sites: tuple[Site, ...], align: int, protected: frozenset[int], model_config: Any
) -> None:
    """What no checkpoint could hold, in time."""
    layers, kinds = {site.layer for site in sites}, {site.kind for site in sites}
    if protected - layers:
        raise ConfigError(
            f"budget.protect names layer {min(protected - layers)}, and there are {len(layers)}, from 0 on"
        )
    if "expert-channels" in kinds and align % EXPERT_ROW_ALIGN:
        raise ConfigError(
            f"budget.align {align} does not do for expert-channels, whose kernels want multiples of {EXPERT_ROW_ALIGN}: "
            f"set it to {max(EXPERT_ROW_ALIGN, align - align % EXPERT_ROW_ALIGN)}"
        )
    if config.layout == "uniform":
        if "mlp" in kinds:
            mlp_width_option(model_config)
        if protected and "layers" not in kinds:
            raise ConfigError(
                "budget.protect with layout uniform says which layers stay, since all are equally wide: "
                "add layers to budget.units, or use layout per-layer"
            )


def _disk_bytes_needed(meta_model: Any, sites: tuple[Site, ...], config: RunConfig) -> int:
    """Two checkpoints of what is tuned and its moments, and of the dense tuned model, one being written; the result."""
    rank = config.lora.rank
    linears = [get_base_linear(meta_model, name) for name in lora_target_modules(meta_model)]
    adapter: int = sum(rank * (axis_size(linear, ROWS) + axis_size(linear, COLUMNS)) for linear in linears)
    weights: int = sum(parameter.numel() for parameter in meta_model.parameters())
    if trains_all_weights(config.train, sites):
        adapter = max(adapter, prunable_params(sites))  # weights and momentum, 8 bytes each
    states = 8 if config.limits else 5  # gates may go back to two more
    return len(config.budget.keeps) * (states * 12 * adapter + 4 * weights) + 64 * 2**20


def data_and_model_facts(context: RunContext) -> dict[str, Any]:
    """Data and dense model, for the manifest."""
    parts, decoder = context.splits.by_name(), prunable_params(context.sites) + context.unprunable_block_params
    return {
        "data": DataFacts(
            hashes=context.splits.hashes,
            counts={name: len(records) for name, records in parts.items()},
            too_long=sum(part.num_too_long for part in context.encoded.values()),
            dropped=context.splits.dropped,
        ),
        "model": DenseModelFacts(name=context.config.model, params=context.dense_params, decoder_params=decoder),
    }
