"""What a run needs before training: model and data opened, options decided, and what cannot work refused."""

import logging
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from prunetune.config.recipe import RunConfig
from prunetune.config.score_limits import STAGE_SCORE, ScoreLimit
from prunetune.cost.training_memory import (
    TrainingMemory,
    TrainingPhase,
    estimate_memory,
    training_setup,
    training_shapes,
)
from prunetune.data.encoding import EncodedExamples, encode
from prunetune.data.sources import SplitName
from prunetune.data.splits import Splits, load_splits
from prunetune.errors import ConfigError, DataError, ModelError, RunFolderError
from prunetune.evaluation.scoring_mode import context_length
from prunetune.manifest import DataFacts
from prunetune.model.loading import (
    LoadedModel,
    load_meta_model,
    load_model_and_tokenizer,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from prunetune.model.provenance import ModelIdentity
from prunetune.model.reduced_vocabulary import (
    choose_vocabulary,
    read_vocabulary,
    reduce_tokenizer,
    reduced_folder,
    reduced_model_of,
    write_reduced_model,
)
from prunetune.pipeline.plan_constraints import apply_budgets, make_plan_constraints
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear
from prunetune.pruning.nf4 import quantize_linears_to_nf4, require_nf4
from prunetune.pruning.sites import find_sites, lora_target_modules, unprunable_params
from prunetune.pruning.units import Site, hidden_site, prunable_params
from prunetune.pruning.vocabulary import KeptVocabulary, prune_model
from prunetune.runs.folder import CHANGEABLE_ON_RESUME, RunFolder, check_folder
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select
from prunetune.train.adapters import LARGE_MODEL_PARAMS
from prunetune.train.job import Observer
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks
from prunetune.train.schedule import build_schedule
from prunetune.utils.files import require_disk_space

log = logging.getLogger(__name__)


class Console(Observer, Protocol):
    """Shows the progress of a run: stages and evaluations as well as training steps."""

    def stage(self, name: str, total: int) -> None:
        """Show that a stage of `total` steps begins."""

    def evaluation_progress(self, task: str, done: int, total: int) -> None:
        """Show that `done` of `total` items of a task are scored."""

    def close(self) -> None:
        """End the display."""


@dataclass(frozen=True)
class RunContext:
    """All that is decided before training: nothing in it changes afterwards."""

    recipe: RunConfig  # as asked: what is written and compared on resume
    # As decided: no "auto" that depends on the model, and `budget.keep` as all budgets allow. Its model is the reduced
    # one in the run folder, if `budget.vocab` prunes tokens.
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
    dense_params: int
    unprunable_block_params: int  # of decoder layers, in kinds of block that are kept whole
    ranks: Ranks = SINGLE_PROCESS
    base: ModelIdentity | None = None  # of the recipe's model; on other ranks than 0, which write nothing, None
    vocabulary: KeptVocabulary | None = None  # if `budget.vocab` prunes tokens

    @property
    def reported_config(self) -> RunConfig:
        """The recipe with the decided budget: for the model card, trackers and the history."""
        return replace(self.recipe, budget=self.config.budget)

    @property
    def original_params(self) -> int:
        """Parameters of the recipe's model, with all of its tokens."""
        return self.vocabulary.original_params if self.vocabulary else self.dense_params

    def write_reduced_model(self) -> None:
        """Write the dense model with the kept tokens to the run folder, if `budget.vocab` prunes any; rank 0 only.

        All that loads the dense model afterwards loads this one. Skipped where it is written.
        """
        if self.vocabulary is None or reduced_model_of(self.folder.path):
            return
        self.console.stage("prune the vocabulary", 0)
        trust = self.config.trust_remote_code
        write_reduced_model(
            self.recipe.model, self.vocabulary, reduced_folder(self.folder.path), trust_remote_code=trust
        )

    def load_dense(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> LoadedModel:
        """Load the dense model again."""
        trust = self.config.trust_remote_code
        device, dtype = device or self.device, dtype or self.dtype
        return load_model_and_tokenizer(
            self.config.model, device=device, dtype=dtype, trust_remote_code=trust, dequantize=True
        )

    def load_for_training(self) -> Any:
        """Load the dense model for the loop, its linears in 4 bits if `lora.quantize` says so.

        If it will be sharded, rank 0 loads the weights into CPU memory, and the other ranks load a meta model.
        """
        if self.ranks.uses_fsdp and not self.ranks.is_main:
            trust = self.config.trust_remote_code
            return load_meta_model(self.config.model, trust_remote_code=trust).eval().requires_grad_(False)
        if not self.ranks.uses_fsdp and self.config.lora.quantize == "off":
            return self.load_dense().model
        model = self.load_dense(device=torch.device("cpu")).model  # so the device holds one dense linear at a time
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
    """Open model and data, decide what the recipe leaves open, and refuse what cannot work; writes nothing.

    A resumed run may change the options in `changeable`. Raises a `PrunetuneError`.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the console shows its own
    # Steps that follow from epochs are known, and compared with those of a resumed run, once the rows are.
    undecided = {"train.steps", "train.epochs"} if config.train.epochs else set()
    folder = check_folder(config, resume=resume, changeable=undecided.union(changeable))
    if config.lora.quantize != "off":
        require_nf4()
    device = pick_device(config.device) if ranks.world_size == 1 else ranks.device
    dtype = pick_dtype(config.dtype, device)
    console.stage("reading model and data", 0)
    redaction = config.report.redaction
    with redaction.errors():
        splits = load_splits(config.data, config.seed, redaction)
    meta_model = load_meta_model(config.model, trust_remote_code=config.trust_remote_code)
    base = ModelIdentity(config.model) if ranks.is_main else None
    if resume:
        _raise_if_not_resumable(folder, splits, base)
    recipe, vocabulary, tokenizer = config, None, None
    if config.budget.vocab != "off":
        tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        with redaction.errors():
            vocabulary = _kept_vocabulary(config, folder, splits, meta_model, tokenizer)
        tokenizer = reduce_tokenizer(config.model, tokenizer, vocabulary)
        prune_model(meta_model, vocabulary)
        config = replace(config, model=str(reduced_folder(folder.path)))
    sites = find_sites(meta_model, config.budget.units)
    dense_params = sum(parameter.numel() for parameter in meta_model.parameters())
    constraints = replace(
        make_plan_constraints(config, sites, meta_model.config),
        model_params=dense_params,
        original_params=vocabulary.original_params if vocabulary and config.budget.of == "model" else 0,
    )
    begun = folder if resume else None
    config, constraints = apply_budgets(resolve_auto(config, sites), sites, constraints, meta_model, device, begun)
    for keep in config.budget.keeps:  # raises `PlanError` for a budget that no plan meets
        select({site.name: torch.zeros(site.units) for site in sites}, sites, keep, constraints)
    if vocabulary is None:
        tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    with redaction.errors():
        encoded = _encode_splits(splits, tokenizer, meta_model, config)
    if config.train.epochs:
        # A row counts as often as its weight says, and texts take their share of a batch.
        rows = math.fsum(example.weight for example in encoded["train"].examples)
        rows_per_step = config.train.batch_size * (1 - config.data.distill_texts_share * ("texts" in encoded))
        steps = max(1, math.ceil(round(config.train.epochs * rows / rows_per_step, 6)))
        log.info("train: %g epochs of %g rows are %d steps", config.train.epochs, rows, steps)
        config, recipe = (
            replace(each, train=replace(each.train, epochs=0.0, steps=steps)) for each in (config, recipe)
        )
        check_folder(recipe, resume=resume, changeable=changeable)
    train = config.train
    on_valid = {"learning_rate auto": not train.learning_rate, "keep_best": train.keep_best, "patience": train.patience}
    if (choosing := [name for name, is_on in on_valid.items() if is_on]) and not encoded["valid"].examples:
        raise DataError(
            f"train.{choosing[0]} chooses on valid, and valid has no row, or none that fits data.max_length: name "
            f"data.valid or a data.valid_share, or leave train.{choosing[0].partition(' ')[0]} out"
        )
    limits = [ScoreLimit.of_stages(entry).metric.removeprefix(STAGE_SCORE) for entry in config.budget.quality_limits]
    tasks = {record.task for record in splits.valid}
    for name in (*limits, *config.budget.quality_of):  # which metric a task has is known once it has been scored
        if name not in {*tasks, "nll", "accuracy"} and name.rpartition(".")[0] not in tasks:
            raise ConfigError(
                f"budget.quality: a limit of {name!r}, and valid has the tasks {', '.join(sorted(tasks)) or 'none'}: "
                "name TASK.accuracy, TASK.nll, or nll, the mean"
            )
    if config.budget.has_quality and (config.lora.rank < config.lora.dense_rank or ranks.uses_fsdp):
        raise ConfigError(
            "budget.quality begins with the adapters of the tuned dense model: set lora.rank to at least "
            f"lora.dense_rank ({config.lora.dense_rank}), and launch without --use_fsdp"
        )
    if ranks.uses_fsdp and config.train.weights == "all":
        raise ConfigError(
            "train.weights: sharded weights are frozen, and a model of this size is tuned in all of its weights: "
            "set train.weights to adapters, or launch without --use_fsdp"
        )
    if ranks.uses_fsdp and config.lora.quantize != "off":
        raise ConfigError("lora.quantize: a base in 4 bits is not sharded; leave it off, or launch without --use_fsdp")
    if hidden_site(sites) and ranks.uses_fsdp:
        raise ConfigError(
            "budget.units: hidden-channels cross all layers, and --use_fsdp cuts one at a time: leave it out"
        )
    require_disk_space(folder.path, sum(disk_bytes_needed(meta_model, sites, config)))
    log.info("model %s on %s in %s, layout %s", recipe.model, device, str(dtype).removeprefix("torch."), config.layout)
    if device.type == "cuda":
        longest = max((len(example.token_ids) for split in encoded.values() for example in split.examples), default=1)
        gpu_bytes = torch.cuda.get_device_properties(device).total_memory
        log_memory_estimate(estimate_peak_memory(meta_model, sites, config, dtype, longest=longest), gpu_bytes)
    return RunContext(
        recipe=recipe,
        config=config,
        folder=folder,
        device=device,
        dtype=dtype,
        sites=sites,
        constraints=constraints,
        tokenizer=tokenizer,
        splits=splits,
        encoded=encoded,
        console=console,
        dense_params=dense_params,
        unprunable_block_params=unprunable_params(meta_model, config.budget.units),
        ranks=ranks,
        base=base,
        vocabulary=vocabulary,
    )


def resolve_auto(config: RunConfig, sites: Sequence[Site]) -> RunConfig:
    """The recipe with all `auto` that depend on the size decided: teacher, its share, tuned weights.

    From 1e9 prunable parameters on, a step must not cost more than LoRA on the dense model does.
    """
    distill, train, large = config.distill, config.train, prunable_params(sites) >= LARGE_MODEL_PARAMS
    if train.weights == "auto":
        train = replace(train, weights="adapters" if large else "all")
    if distill.teacher == "auto":
        distill = replace(distill, teacher="base" if large else "dense")
    distill = replace(distill, share=distill.share or (0.5 if large else 1.0))
    return replace(config, distill=distill, train=train)


def _kept_vocabulary(
    config: RunConfig, folder: RunFolder, splits: Splits, meta_model: Any, tokenizer: Any
) -> KeptVocabulary:
    """The tokens that `budget.vocab` keeps: chosen by train, search and texts, or as a resumed run has written."""
    if (written := reduced_model_of(folder.path)) is not None:
        return read_vocabulary(written)
    records = [record for name in ("train", "search", "texts") for record in splits.by_name().get(name, ())]
    examples = encode(records, tokenizer, config.data, context_length(meta_model)).examples
    counts = Counter(token for example in examples for token in example.token_ids)
    vocabulary = choose_vocabulary(config.model, meta_model, tokenizer, config.budget.vocab, counts)
    log.info(
        "vocabulary: %d of %d tokens stay; %.1f%% of the tokens of the data are among them",
        vocabulary.rows, vocabulary.original_rows,
        100 * sum(counts[token] for token in vocabulary.kept) / max(1, counts.total()),
    )  # fmt: skip
    return vocabulary


def _encode_splits(
    splits: Splits, tokenizer: Any, meta_model: Any, config: RunConfig
) -> dict[SplitName, EncodedExamples]:
    """All splits as tokens; raises `DataError` or `ModelError` if a run could not use them."""
    max_tokens = context_length(meta_model)
    embedding_rows = getattr(meta_model.config.get_text_config(), "vocab_size", math.inf)
    encoded = {name: encode(records, tokenizer, config.data, max_tokens) for name, records in splits.by_name().items()}
    for name, split in encoded.items():
        if split.num_too_long:
            log.warning(
                "%s: %d examples are longer than the limit (longest %d tokens): data.too_long=%s",
                name, split.num_too_long, split.longest, config.data.too_long,
            )  # fmt: skip
        if split.num_too_long and not split.examples and name in ("train", "search", "test"):
            raise DataError(
                f"no example of {name} fits the limit (longest {split.longest} tokens): raise data.max_length, "
                "or set data.too_long=truncate"
            )
        highest = max((max(example.token_ids, default=0) for example in split.examples), default=0)
        if highest >= embedding_rows:
            raise ModelError(
                f"model {config.model}: its tokenizer gives token {highest} ({name}), and its embedding has "
                f"{embedding_rows} rows; resize it (model.resize_token_embeddings(len(tokenizer))) and save both"
            )
    return encoded


def _raise_if_not_resumable(folder: RunFolder, splits: Splits, base: ModelIdentity | None) -> None:
    """Raises `RunFolderError` for one size of a larger run, and if rows or model are not what the run began with."""
    try:
        manifest = folder.read_manifest()
    except (ValueError, OSError) as broken:
        raise RunFolderError(
            f"{folder.path}/manifest.json cannot be read ({broken}): put it back, or start anew with another --out"
        ) from broken
    if manifest.size:
        raise RunFolderError(f"{folder.path} is one size of a run: go on with the run around it")
    before = manifest.data.hashes
    changed = [name for name, digest in splits.hashes.items() if before.get(name, digest) != digest]
    if changed:
        raise RunFolderError(
            f"{folder.path}: the data of {', '.join(changed)} changed since the run began: "
            "put the old rows back, or start anew with another --out"
        )
    if base is None or not manifest:
        return
    if not manifest.model.identity:
        log.warning("%s does not say which files its model had: whether they changed cannot be checked", folder.path)
    elif changes := base.changes_since(manifest.model.identity):
        raise RunFolderError(
            f"{folder.path}: model {base.name} is not the one that the run began with ({changes}): "
            "put the old files back, or start anew with another --out"
        )


def estimate_peak_memory(
    meta_model: Any, sites: tuple[Site, ...], config: RunConfig, dtype: torch.dtype, *, longest: int
) -> TrainingMemory:
    """Memory of the phase that takes most of it, under a resolved config; `longest`: tokens of the longest example.

    That is before the first cut, or after it: every later cut makes the model smaller.
    """
    shapes, schedule = training_shapes(meta_model, sites), build_schedule(config)
    setup = training_setup(config, dtype, longest=longest, all_weights=config.train.weights == "all")
    first_stage = replace(setup, keep=schedule.keep_after(schedule.cuts[0]))
    before: TrainingPhase = "search" if config.search.method == "generator" else "scores"
    phases = (
        estimate_memory(shapes, replace(setup, keep=1.0), phase=before),
        estimate_memory(shapes, first_stage, phase="tune"),
    )
    return max(phases, key=lambda memory: memory.total)


def log_memory_estimate(estimate: TrainingMemory, gpu_bytes: int) -> None:
    """Log the estimate beside the memory of the GPU, with a warning if it is larger."""
    parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in asdict(estimate).items() if value >= 5e7)
    log.info("memory: about %.1f GB of %.1f (%s)", estimate.total / 1e9, gpu_bytes / 1e9, parts)
    if estimate.total > gpu_bytes:
        log.warning(
            "memory: more than there is; passes that do not fit are made smaller. Lower train.micro_tokens, "
            "set train.checkpointing on, distill.teacher base or none, or lora.quantize nf4"
        )


def with_distill_texts(context: RunContext, context_length: int) -> RunContext:
    """The context with the distillation texts that its config names now; the other splits are unchanged."""
    texts = load_splits(context.config.data, context.config.seed, context.config.report.redaction).texts
    encoded = {**context.encoded, "texts": encode(texts, context.tokenizer, context.config.data, context_length)}
    return replace(context, splits=replace(context.splits, texts=texts), encoded=encoded)


def disk_bytes_needed(meta_model: Any, sites: tuple[Site, ...], config: RunConfig) -> tuple[int, int]:
    """Most bytes of (checkpoints: weights or adapters with optimizer moments; written models and all else) of a run."""
    rank = config.lora.rank
    linears = [get_base_linear(meta_model, name) for name in lora_target_modules(meta_model)]
    adapter: int = sum(rank * (axis_size(linear, ROWS) + axis_size(linear, COLUMNS)) for linear in linears)
    weights: int = sum(parameter.numel() for parameter in meta_model.parameters())
    if config.train.weights == "all":
        adapter = max(adapter, prunable_params(sites))  # weights and momentum, 8 bytes each
    # Two of the run, two of the dense tuned model, one in writing; more to go back to.
    states = 8 if config.limits or config.budget.has_quality or config.train.keep_best else 5
    sizes = len(config.budget.keeps)
    models = sizes + (config.budget.vocab != "off")  # the dense model with fewer tokens is written, too
    return sizes * states * 12 * adapter, models * 4 * weights + 64 * 2**20


def data_and_model_facts(context: RunContext) -> dict[str, Any]:
    """Facts about data and dense model, for the manifest."""
    kept = context.vocabulary
    return {
        "data": DataFacts(
            hashes=context.splits.hashes,
            counts={name: len(records) for name, records in context.splits.by_name().items()},
            too_long=sum(split.num_too_long for split in context.encoded.values()),
            dropped=context.splits.dropped,
        ),
        "model": replace(
            context.folder.read_manifest().model,  # a resumed run knows the bytes, too
            name=context.recipe.model,
            identity=context.base.digests if context.base else {},
            params=context.original_params,
            decoder_params=prunable_params(context.sites) + context.unprunable_block_params,
            tokens=kept.original_rows if kept else None,
            kept_tokens=kept.rows if kept else None,
            reduced_params=context.dense_params if kept else None,
        ),
    }
