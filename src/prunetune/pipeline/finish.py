"""From a run's last checkpoint to `model/`: adapters merged and units cut at once, written, opened and compared."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunetune.config.recipe import RunConfig
from prunetune.data.encoding import chat_stop_id, uses_chat_template
from prunetune.errors import SelfCheckFailed
from prunetune.evaluation.results import Evaluation, headline_metric
from prunetune.export import selfcheck
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.model_card import Provenance, ScoreRow, format_model_card
from prunetune.export.selfcheck import FreshReader, check_checkpoint, compare_logits, compute_logits
from prunetune.export.streamed_cut import StreamedModel, WeightMerger, cut_streamed
from prunetune.manifest import PrunedModelFacts, QuantisedFacts, SelfCheckFacts
from prunetune.model.loading import load_empty_model, open_safetensors, processor_files
from prunetune.model.provenance import PruningRun, has_per_layer_config, read_history, read_license
from prunetune.pipeline.monitor import tuning_facts
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.recording import record_timing
from prunetune.plan import Plan
from prunetune.pruning.cut import add_adapter, cut
from prunetune.pruning.linears import get_base_linear
from prunetune.pruning.masking import masked
from prunetune.pruning.nf4 import cut_axes, round_to_nf4
from prunetune.pruning.sites import lora_target_modules
from prunetune.pruning.units import Site, effective_layout, hidden_site, kept_params, prunable_params, removed_params
from prunetune.runs.folder import RunFolder
from prunetune.train.adapters import ADAPTER_NAME, LARGE_MODEL_PARAMS, add_adapters, expand_tensors
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.utils.files import sha256, write_text

log = logging.getLogger(__name__)


def finish(context: RunContext, *, streamed: bool = False) -> None:
    """Write the tuned model to `model/`, cut, and check it; skipped where that is written.

    A large model is cut with one layer in memory at a time, and any model if `streamed`. Raises `SelfCheckFailed`.
    """
    if context.folder.model_folder.exists():
        return
    context.folder.update_manifest(**tuning_facts(context))
    with record_timing(context.folder, "cut and check"), selfcheck.FreshReader() as reader:
        _cut_write_and_check(context, reader, streamed=streamed)


def _cut_write_and_check(context: RunContext, reader: FreshReader, *, streamed: bool) -> None:
    context.console.stage("cut, write and check", 0)
    state = Checkpoints(context.folder.checkpoints).latest()
    assert state is not None
    assert state.plan is not None
    tokens = check_tokens(context)
    # The weights of a large model may not fit into memory; adapters alone were tuned, unless the recipe says otherwise.
    is_large = prunable_params(context.sites) >= LARGE_MODEL_PARAMS and context.config.train.weights != "all"
    # A layer that is cut before the next one is loaded cannot lose channels that all layers share.
    crosses_layers = hidden_site(context.sites) is not None
    streamer = _open_streamed(context, state) if (streamed or is_large) and not crosses_layers else None
    shards = context.folder.path / "model.shards" if streamer else None  # of weights that the cut model does not hold
    if streamer and shards:
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir()
        expected_logits = cut_streamed(streamer, state.plan, context.sites, tokens, shards)
        model, storage_dtype = streamer.model, streamer.storage_dtype
    else:
        loaded = context.load_dense(torch.float32, torch.device("cpu"))
        model, storage_dtype = loaded.model, loaded.checkpoint_dtype
        merge = _weight_merger(model, context, state)
        for name, parameter in model.named_parameters():
            # Rounded to what the file will hold, computed in float32: what is compared is the cut, not the rounding.
            parameter.data = merge(name, parameter.data).to(storage_dtype).float()
        with masked(model, state.plan, sites=context.sites):
            expected_logits = compute_logits(model, tokens)
        model = cut(model, state.plan, sites=context.sites).to(storage_dtype)
    if has_nf4_adapters(context, state):
        context.folder.update_manifest(quantised=_compare_with_merged(context, state, tokens, expected_logits))
    expected = ExpectedModel(model, storage_dtype, expected_logits, shards)
    write_and_check(context, expected, state.plan, tokens, streamed=streamer is not None, reader=reader)


@dataclass(frozen=True)
class ExpectedModel:
    """A cut model to be written, and what it has to give once it is reopened."""

    model: Any
    dtype: torch.dtype  # that its files will have
    logits: Tensor  # [B, T, V] of `check_tokens`
    shards: Path | None = None  # files of the weights that the model does not hold


def write_and_check(
    context: RunContext,
    expected: ExpectedModel,
    plan: Plan,
    tokens: Tensor,
    *,
    streamed: bool = False,
    reader: FreshReader | None = None,
) -> None:
    """Write a model, cut by the plan, to the run's `model/`, with its plan and manifest, once it has passed its check.

    Raises `ModelError` before a file is written if a stock class has no place for it, `SelfCheckFailed`.
    """
    write_text(context.folder.plan_file, plan.to_json())
    unchecked = context.folder.path / "model.unchecked"
    has_chats = any(uses_chat_template(record, context.config.data.template) for record in context.splits.train)
    written = write_checkpoint(
        expected.model,
        context.tokenizer,
        plan,
        context.sites,
        unchecked,
        layout=context.config.layout,
        card=render_card(context.folder, context.reported_config, plan, context.sites),
        shards=expected.shards,
        processor_files=processor_files(context.config.model),
        history=pruning_history(context.folder, context.reported_config, plan, context.sites),
        end_token=chat_stop_id(context.tokenizer) if has_chats else None,
    )
    outcome = check_checkpoint(written, tokens, expected.logits, streamed=streamed, reader=reader)
    context.folder.update_manifest(
        model=replace(context.folder.read_manifest().model, bytes=context.original_params * expected.dtype.itemsize),
        pruned=PrunedModelFacts(
            **asdict(written) | {"folder": "model"},
            class_name=written.architecture,
            decoder_params=kept_params(context.sites, plan) + context.unprunable_block_params,
            dtype=str(expected.dtype).removeprefix("torch."),
        ),
        selfcheck=SelfCheckFacts(**outcome.to_dict()),
    )
    unchecked.rename(context.folder.model_folder)  # from here on model/ exists, is whole, and has passed its check


def _dense_tensors(model: Any, context: RunContext, state: TrainingState) -> Mapping[str, Tensor]:
    """A checkpoint's adapters, or the weights they were merged into, in the dense model's shapes (`expand_tensors`)."""
    tensors = state.tensors["adapters"]
    if not state.is_cut:
        return tensors
    assert state.plan is not None
    return expand_tensors(model, tensors, state.plan, context.sites)


def _weight_merger(model: Any, context: RunContext, state: TrainingState) -> WeightMerger:
    """A function from a dense weight, which it may change in place, to the tuned one, with its adapter merged."""
    rank, alpha = context.config.lora.rank, context.config.lora.alpha
    linears = {f"{name}.weight": get_base_linear(model, name) for name in lora_target_modules(model)}
    tuned = _dense_tensors(model, context, state)
    axes_in_nf4 = cut_axes(model, context.sites) if has_nf4_adapters(context, state) else {}

    def merge(name: str, weight: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        if module in axes_in_nf4:  # adapters were tuned on the rounded weight
            axis, dtype, device = axes_in_nf4[module], context.dtype, context.device
            weight.copy_(round_to_nf4(linears[name], weight, cut_axis=axis, dtype=dtype, device=device))
        lora_a, lora_b = (tuned.get(f"{module}.lora_{half}.{ADAPTER_NAME}.weight") for half in "AB")
        if name in linears and lora_a is not None and lora_b is not None:
            add_adapter(linears[name], weight, lora_a, lora_b, (alpha or 2 * rank) / rank)
        return tuned.get(name, weight)

    return merge


# -- layer by layer ----------------------------------------------------------------------------------------------------


def _open_streamed(context: RunContext, state: TrainingState) -> StreamedModel | None:
    """The model to cut layer by layer; None if its weights are not stored under the names that they have in memory."""
    name, trust = context.config.model, context.config.trust_remote_code
    model = load_empty_model(name, trust_remote_code=trust)
    stored = open_safetensors(name, trust_remote_code=trust)
    if not stored.has_all(parameter for parameter, _ in model.named_parameters()):
        log.warning("the model's files use other names than its class: it is cut as a whole, in CPU memory")
        return None
    return StreamedModel(model, stored, _weight_merger(model, context, state))


def check_tokens(context: RunContext) -> Tensor:
    """[B, T] ids of real examples, at most 4 of 64 tokens, cut to equal length."""
    examples = context.encoded["test"].examples[:4]
    length = min(64, *(len(example.token_ids) for example in examples))  # a run without any was refused
    return torch.tensor([example.token_ids[:length] for example in examples])


MAX_LOGIT_ERROR = 0.2  # largest relative error of logits (root mean square) that arithmetic in 16 bits may explain


def has_nf4_adapters(context: RunContext, state: TrainingState) -> bool:
    """Whether a checkpoint holds adapters of a 4-bit base; false once they are merged and all weights are tuned."""
    is_merged = state.is_cut and context.config.train.weights == "all"
    return context.config.lora.quantize != "off" and not is_merged


@torch.no_grad()
def _compare_with_merged(
    context: RunContext, state: TrainingState, tokens: Tensor, expected_logits: Tensor
) -> QuantisedFacts:
    """Compare the model as it was tuned (4-bit base, adapters, gated) with the logits of the merged one, [B, T, V].

    Raises `SelfCheckFailed` if the relative error is above `MAX_LOGIT_ERROR`.
    """
    assert state.plan is not None
    model = context.load_for_training()
    add_adapters(model, context.sites, context.config.lora, seed=0)  # those of a removed block add nothing
    for name, weight in _dense_tensors(model, context, state).items():
        model.get_parameter(name).data = weight.to(context.device)
    mixed = torch.autocast(context.device.type, context.dtype, enabled=context.dtype != torch.float32)
    with masked(model, state.plan, sites=context.sites), mixed:
        logits = compute_logits(model, tokens)
    error, same = compare_logits(logits, expected_logits)
    summary = f"{100 * error:.2f}% root mean square error of logits, {100 * same:.0f}% of most likely tokens equal"
    if not error <= MAX_LOGIT_ERROR:  # NaN fails too
        raise SelfCheckFailed(
            f"the merged model is not the one that was tuned in 4 bits: {summary} "
            f"(limit {100 * MAX_LOGIT_ERROR:.0f}%); the run's checkpoints are kept, please report this"
        )
    log.info("merged against tuned in %s: %s", context.config.lora.quantize, summary)
    return QuantisedFacts(scheme=context.config.lora.quantize, error=error, same=same)


# -- the model card: written with the checkpoint, and again once the scores are known ----------------------------------

MODEL_NAMES = ("dense", "tuned", "pruned")


def render_card(folder: RunFolder, config: RunConfig, plan: Plan, sites: Sequence[Site]) -> str:
    """The text of the card, from what the run folder holds so far."""
    history = pruning_history(folder, config, plan, sites)
    origin = Provenance(
        config=config,
        manifest=folder.read_manifest(),
        licence=read_license(config.model),
        scores=card_scores(folder),
        recipe_sha256=history[-1].recipe_sha256,
        history=history,
    )
    return format_model_card(origin, plan, sites)


def pruning_history(folder: RunFolder, config: RunConfig, plan: Plan, sites: Sequence[Site]) -> tuple[PruningRun, ...]:
    """The runs that made the model, this one last."""
    recipe, dense = folder.path / "config.yaml", folder.read_manifest().model
    dense_params = dense.reduced_params or dense.params or 0
    run = PruningRun(
        model=config.model,
        layout="per-layer" if has_per_layer_config(config.model) else effective_layout(config.layout, sites),
        kept=kept_params(sites, plan) / sum(site.params for site in sites),
        params=dense_params - removed_params(sites, plan),
        steps=config.train.steps,
        recipe_sha256=sha256(recipe) if recipe.is_file() else "",
    )
    return (*read_history(config.model), run)


def rewrite_card(folder: RunFolder, config: RunConfig, sites: Sequence[Site]) -> Path:
    """Write the finished model's card again, now with scores; `SHA256SUMS` does not list the card."""
    path = folder.model_folder / "README.md"
    write_text(path, render_card(folder, config, Plan.load(folder.plan_file), sites))
    return path


def card_scores(folder: RunFolder) -> tuple[ScoreRow, ...]:
    """Headline metric and NLL of each task, of the models scored so far; empty until the pruned one is."""
    files = {name: folder.evaluation_file(name) for name in MODEL_NAMES}
    evaluations = {
        name: Evaluation.from_json(file.read_text("utf-8")) for name, file in files.items() if file.is_file()
    }
    if "pruned" not in evaluations:
        return ()
    rows = []
    for task, result in evaluations["pruned"].tasks.items():
        for metric in dict.fromkeys((headline_metric(result), "nll")):
            scores = {
                name: evaluation.tasks[task].scores[metric]
                for name, evaluation in evaluations.items()
                if task in evaluation.tasks and metric in evaluation.tasks[task].scores
            }
            if scores:
                rows.append(ScoreRow(task, metric, {name: (s.value, s.se, s.n) for name, s in scores.items()}))
    return tuple(rows)
