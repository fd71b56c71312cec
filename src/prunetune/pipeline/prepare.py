"""All that is decided before training: opened, checked, and refused where it cannot work; nothing is written here."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from prunetune.bench.latency.tables import table_for
from prunetune.config.recipe import RunConfig
from prunetune.cost.layer_shapes import anatomy_of
from prunetune.cost.limits import TIMED, caps_of
from prunetune.cost.parameters import total
from prunetune.cost.training_memory import Memory, memory, setup_of, shapes_of
from prunetune.data.sources import SplitName
from prunetune.data.splits import Splits, load_splits
from prunetune.data.templates import Encoded, encode
from prunetune.errors import ConfigError, DataError, ModelError, RunFolderError
from prunetune.evaluation.score_records import context_of
from prunetune.export.shapes import legal_groups, width_of
from prunetune.model.loading import Loaded, ghost, load, load_tokenizer, pick_device, pick_dtype
from prunetune.pipeline.budget_preview import limit_lines
from prunetune.pruning.linears import COLUMNS, ROWS, linear_of, size
from prunetune.pruning.nf4 import hold_in_four_bits, require_nf4
from prunetune.pruning.sites import Site, find_sites, tuned_linears, whole_params
from prunetune.runs.folder import FREE, RunFolder, check_folder
from prunetune.search.feasibility import even, limited
from prunetune.search.plan_rules import GROUPED
from prunetune.search.select import Shape, default_align, select
from prunetune.train.adapters import tunes_all
from prunetune.train.job import Observer
from prunetune.train.parallel.ranks import ALONE, Ranks
from prunetune.train.teacher import by_size
from prunetune.utils.files import need_space

log = logging.getLogger(__name__)


class Console(Observer, Protocol):
    """Hears of stages as well as of steps."""

    def stage(self, name: str, total: int) -> None:
        """A stage of so many steps begins."""

    def passed(self, task: str, done: int, total: int) -> None:
        """An evaluation has come so far."""

    def close(self) -> None:
        """Nothing more will come."""


@dataclass(frozen=True)
class Setting:
    """All that is decided before training: nothing in it changes afterwards."""

    config: RunConfig
    folder: RunFolder
    device: torch.device
    dtype: torch.dtype
    sites: tuple[Site, ...]
    shape: Shape
    tokenizer: Any
    splits: Splits
    encoded: Mapping[SplitName, Encoded]
    console: Console
    params: int  # of the dense model
    whole: (
        int  # of them in decoder layers, where a kind of block stays whole; so that what is removed is a share of both
    )
    ranks: Ranks = ALONE

    def load(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Loaded:
        """The dense model, anew."""
        trust = self.config.trust_remote_code
        return load(self.config.model, device=device or self.device, dtype=dtype or self.dtype, trust_remote_code=trust)

    def to_train(self) -> Any:
        """The dense model anew for the loop: its linears in 4 bits where `lora.quantize` says so.

        Where it will be sharded, it is in rank 0's memory, and on others its structure.
        """
        if self.ranks.shards and not self.ranks.is_main:
            trust = self.config.trust_remote_code
            return ghost(self.config.model, trust_remote_code=trust).eval().requires_grad_(False)
        if not self.ranks.shards and self.config.lora.quantize == "off":
            return self.load().model
        model = self.load(device=torch.device("cpu")).model  # the device holds no dense linear but one at a time
        if self.ranks.shards:
            return model
        hold_in_four_bits(model, self.sites, dtype=self.dtype, device=self.device)
        return model.to(self.device)


def prepare(
    config: RunConfig, *, resume: bool, console: Console, free: Collection[str] = FREE, ranks: Ranks = ALONE
) -> Setting:
    """Open everything and refuse what cannot work; writes nothing. A resumed run may change what is in `free`."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # every stage has a line or a bar of our own
    folder = check_folder(config, resume=resume, free=free)
    if config.lora.quantize != "off":
        require_nf4()
    device = pick_device(config.device) if ranks.world == 1 else ranks.device
    dtype = pick_dtype(config.dtype, device)
    console.stage("reading model and data", 0)
    splits = load_splits(config.data, config.seed)
    structure = ghost(config.model, trust_remote_code=config.trust_remote_code)
    sites = find_sites(structure, config.budget.units)
    shape = shape_of(config, sites, structure.config)
    config, shape = budgeted(config, sites, shape, structure, device)
    for keep in config.budget.keeps:  # refuses in time
        select({site.name: torch.zeros(site.units) for site in sites}, sites, keep, shape)
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    if resume:
        _same_data(folder, splits)
    encoded = _encoded(splits, tokenizer, structure, config)
    params = sum(parameter.numel() for parameter in structure.parameters())
    whole = whole_params(structure, config.budget.units)
    if ranks.shards and tunes_all(config.train, sites):
        raise ConfigError(
            "train.weights: sharded weights are frozen, and a model of this size is tuned in all of its weights: "
            "set train.weights to adapters, or launch without --use_fsdp"
        )
    if ranks.shards and config.lora.quantize != "off":
        raise ConfigError("lora.quantize: a base in 4 bits is not sharded; leave it off, or launch without --use_fsdp")
    need_space(folder.path, _bytes_needed(structure, sites, config))
    log.info("model %s on %s in %s, layout %s", config.model, device, str(dtype).removeprefix("torch."), config.layout)
    if device.type == "cuda":
        longest = max((len(example.ids) for part in encoded.values() for example in part.examples), default=1)
        room = torch.cuda.get_device_properties(device).total_memory
        say_memory(peak_of(structure, sites, config, dtype, longest=longest), room)
    return Setting(
        config, folder, device, dtype, sites, shape, tokenizer, splits, encoded, console, params, whole, ranks
    )


def _encoded(splits: Splits, tokenizer: Any, structure: Any, config: RunConfig) -> dict[SplitName, Encoded]:
    """All splits as tokens; raises a `PrunetuneError` where a run could not use them."""
    context, rows = context_of(structure), getattr(structure.config.get_text_config(), "vocab_size", math.inf)
    encoded = {name: encode(records, tokenizer, config.data, context) for name, records in splits.parts().items()}
    for name, part in encoded.items():
        if part.too_long:
            log.warning(
                "%s: %d examples are longer than the limit (longest %d tokens): data.too_long=%s",
                name,
                part.too_long,
                part.longest,
                config.data.too_long,
            )
        _refuse_unusable(name, part, rows, config.model)
    return encoded


def _refuse_unusable(name: SplitName, part: Encoded, rows: float, model: str) -> None:
    if part.too_long and not part.examples and name in ("train", "search", "test"):
        raise DataError(
            f"no example of {name} fits the limit (longest {part.longest} tokens): raise data.max_length, "
            "or set data.too_long=truncate"
        )
    highest = max((max(example.ids, default=0) for example in part.examples), default=0)
    if highest >= rows:
        raise ModelError(
            f"model {model}: its tokenizer gives token {highest} ({name}), and its embedding has {rows} rows; "
            "resize it (model.resize_token_embeddings(len(tokenizer))) and save both"
        )


def _same_data(folder: RunFolder, splits: Splits) -> None:
    """A run goes on only with the rows it began with; raises `RunFolderError`."""
    before = folder.manifest().get("data", {}).get("hashes", {})
    changed = [name for name, digest in splits.hashes.items() if before.get(name, digest) != digest]
    if changed:
        raise RunFolderError(
            f"{folder.path}: the data of {', '.join(changed)} changed since the run began: "
            "put the old rows back, or start anew with another --out"
        )


def peak_of(structure: Any, sites: tuple[Site, ...], config: RunConfig, dtype: torch.dtype, *, longest: int) -> Memory:
    """The fuller of the two phases, see `budget.memory`; `longest`: tokens of the longest example."""
    shapes, config = shapes_of(structure, sites), by_size(config, sites)
    setup = setup_of(config, dtype, longest=longest, all_weights=tunes_all(config.train, sites))
    return max(
        memory(shapes, setup, phase="search"), memory(shapes, setup, phase="tune"), key=lambda found: found.total
    )


def say_memory(found: Memory, room: int) -> None:
    """What a run will hold of a GPU's `room`, in bytes; a warning where that is not enough."""
    parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in asdict(found).items() if value >= 5e7)
    log.info("memory: about %.1f GB of %.1f (%s)", found.total / 1e9, room / 1e9, parts)
    if found.total > room:
        log.warning(
            "memory: more than there is; passes are made smaller where they do not fit. Lower train.micro_tokens, "
            "set train.checkpointing on, distill.teacher base or none, or lora.quantize nf4"
        )


def budgeted(
    config: RunConfig, sites: tuple[Site, ...], shape: Shape, structure: Any, device: torch.device
) -> tuple[RunConfig, Shape]:
    """Budgets beside `budget.keep` become part of the shape, and `budget.keep` the share that they leave about.

    Raises a `PrunetuneError` for one that cannot be met or measured.
    """
    amounts = config.budget.amounts()
    if not amounts:
        return config, shape
    anatomy, workload = anatomy_of(structure, sites), config.workload
    table = None
    if any(kind in TIMED for kind in amounts):
        table = table_for(structure.config, sites, workload, device, shape.align, config.budget.table)
    shape = limited(shape, sites, caps_of(amounts, anatomy, workload, table), config.budget.keep)
    assert shape.limits is not None
    for line in limit_lines(shape.limits, select(even(sites), sites, shape.limits.keep, shape)):
        log.info(line)
    return replace(config, budget=replace(config.budget, keep=shape.limits.keep)), shape


def with_texts(setting: Setting, context: int) -> Setting:
    """The setting with the texts that its recipe names now; the other splits stay as they are."""
    texts = load_splits(setting.config.data, setting.config.seed).texts
    encoded = {**setting.encoded, "texts": encode(texts, setting.tokenizer, setting.config.data, context)}
    return replace(setting, splits=replace(setting.splits, texts=texts), encoded=encoded)


def shape_of(
    config: RunConfig, sites: tuple[Site, ...], model_config: Any, groups: Callable[[int], bool] | None = None
) -> Shape:
    """What a legal plan looks like for this model and layout; `groups`, where it is known which ones are legal."""
    budget = config.budget
    align, protected = budget.align or default_align(sites), budget.protected()
    _refuse(config, sites, align, protected, model_config)
    return Shape(
        config.layout,
        align,
        budget.min_groups,
        groups or legal_groups(model_config),
        min_share=budget.min_share,
        min_experts=budget.min_experts,
        min_queries=budget.min_queries,
        protected=protected,
        tensor_parallel=budget.tensor_parallel,
    )


def _refuse(
    config: RunConfig, sites: tuple[Site, ...], align: int, protected: frozenset[int], model_config: Any
) -> None:
    """What no checkpoint could hold, in time."""
    layers, kinds = {site.layer for site in sites}, {site.kind for site in sites}
    if protected - layers:
        raise ConfigError(
            f"budget.protect names layer {min(protected - layers)}, and there are {len(layers)}, from 0 on"
        )
    if "expert-channels" in kinds and align % GROUPED:
        raise ConfigError(
            f"budget.align {align} does not do for expert-channels, whose kernels want multiples of {GROUPED}: "
            f"set it to {max(GROUPED, align - align % GROUPED)}"
        )
    if config.layout == "uniform":
        if "mlp" in kinds:
            width_of(model_config)
        if protected and "layers" not in kinds:
            raise ConfigError(
                "budget.protect with layout uniform says which layers stay, since all are equally wide: "
                "add layers to budget.units, or use layout per-layer"
            )


def _bytes_needed(structure: Any, sites: tuple[Site, ...], config: RunConfig) -> int:
    """Two checkpoints of what is tuned and its moments, and of the dense tuned model, one being written; the result."""
    rank = config.lora.rank
    linears = [linear_of(structure, name) for name in tuned_linears(structure)]
    adapter: int = sum(rank * (size(linear, ROWS) + size(linear, COLUMNS)) for linear in linears)
    weights: int = sum(parameter.numel() for parameter in structure.parameters())
    if tunes_all(config.train, sites):
        adapter = max(adapter, total(sites))  # weights and momentum, 8 bytes each
    states = 8 if config.gates else 5  # gates may go back to two more
    return len(config.budget.keeps) * (states * 12 * adapter + 4 * weights) + 64 * 2**20


def facts_of(setting: Setting) -> dict[str, Any]:
    """Data and dense model, for the manifest."""
    parts, decoder = setting.splits.parts(), total(setting.sites) + setting.whole
    return {
        "data": {
            "hashes": setting.splits.hashes,
            "counts": {name: len(records) for name, records in parts.items()},
            "too_long": sum(part.too_long for part in setting.encoded.values()),
            "dropped": setting.splits.dropped,
        },
        "model": {"name": setting.config.model, "params": setting.params, "decoder_params": decoder},
    }
