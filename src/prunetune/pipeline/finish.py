"""From a run's last checkpoint to `model/`: adapters merged and units cut at once, written, opened and compared."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunetune.cost.parameters import prunable_params
from prunetune.data.encoding import chat_stop_id, uses_chat_template
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.selfcheck import check_checkpoint, compute_logits
from prunetune.export.streamed_cut import StreamedModel, WeightMerger, cut_streamed
from prunetune.manifest import PrunedModelFacts, QuantisedFacts, SelfCheckFacts
from prunetune.model.loading import load_empty_model, open_safetensors, processor_files
from prunetune.pipeline.card_facts import pruning_history, render_card
from prunetune.pipeline.monitor import tuning_facts
from prunetune.pipeline.nf4_check import compare_with_merged, has_nf4_adapters
from prunetune.pipeline.prepare import RunContext
from prunetune.pipeline.recording import record_timing
from prunetune.plan import Plan
from prunetune.pruning.cut import add_adapter, cut
from prunetune.pruning.linears import get_base_linear
from prunetune.pruning.masking import masked
from prunetune.pruning.nf4 import cut_axes, round_to_nf4
from prunetune.pruning.sites import lora_target_modules
from prunetune.pruning.units import kept_params
from prunetune.train.adapters import ADAPTER_NAME, LARGE_MODEL_PARAMS, add_adapters, expand_tensors
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)


class CutModel(NamedTuple):
    """A cut model, with the logits of its gated original on the tokens of the check."""

    model: Any
    storage_dtype: torch.dtype
    expected_logits: Tensor
    shards: Path | None = None  # folder of its weights, if it was cut layer by layer and holds none itself


def finish(context: RunContext, *, streamed: bool = False) -> None:
    """Write the tuned model to `model/`, cut, and check it; skipped where that is written.

    A large model is cut with one layer in memory at a time, and any model if `streamed`. Raises `SelfCheckFailed`.
    """
    if context.folder.model_folder.exists():
        return
    context.folder.update_manifest(**tuning_facts(context))
    with record_timing(context.folder, "cut and check"):
        _cut_write_and_check(context, streamed=streamed)


def _cut_write_and_check(context: RunContext, *, streamed: bool) -> None:
    context.console.stage("cut, write and check", 0)
    state = Checkpoints(context.folder.checkpoints).latest()
    assert state is not None
    assert state.plan is not None
    tokens = check_tokens(context)
    # The weights of a large model may not fit into memory; adapters alone were tuned, unless the recipe says otherwise.
    is_large = prunable_params(context.sites) >= LARGE_MODEL_PARAMS and context.config.train.weights != "all"
    streamer = _open_streamed(context, state) if streamed or is_large else None
    if streamer is None:
        pruned = _cut_in_memory(context, state, tokens)
    else:
        shards = context.folder.path / "model.shards"
        shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir()
        expected = cut_streamed(streamer, state.plan, context.sites, tokens, shards)
        pruned = CutModel(streamer.model, streamer.storage_dtype, expected, shards)
    if has_nf4_adapters(context, state):  # merged, the model has to give the logits that it was tuned to give
        base = context.load_for_training()
        add_adapters(base, context.sites, context.config.lora, seed=0)  # those of a removed block add nothing
        for name, weight in _dense_tensors(base, context, state).items():
            base.get_parameter(name).data = weight.to(context.device)
        compared = compare_with_merged(base, state.plan, context, tokens, pruned.expected_logits)
        del base  # its memory is free before the written model is opened
        context.folder.update_manifest(quantised=QuantisedFacts(**compared))
    write_and_check(context, pruned, state.plan, tokens, streamed=streamer is not None)


def write_and_check(
    context: RunContext, pruned: CutModel, plan: Plan, tokens: Tensor, *, streamed: bool = False
) -> None:
    """Write a model, cut by the plan, to the run's `model/`, with its plan and manifest, once it has passed its check.

    Raises `ModelError` before a file is written if a stock class has no place for it, `SelfCheckFailed`.
    """
    write_text(context.folder.plan_file, plan.to_json())
    unchecked = context.folder.path / "model.unchecked"
    has_chats = any(uses_chat_template(record, context.config.data.template) for record in context.splits.train)
    written = write_checkpoint(
        pruned.model,
        context.tokenizer,
        plan,
        context.sites,
        unchecked,
        layout=context.config.layout,
        card=render_card(context.folder, context.reported_config, plan, context.sites),
        shards=pruned.shards,
        processor_files=processor_files(context.config.model),
        history=pruning_history(context.folder, context.reported_config, plan, context.sites),
        end_token=chat_stop_id(context.tokenizer) if has_chats else None,
    )
    selfcheck = check_checkpoint(written, tokens, pruned.expected_logits, streamed=streamed)
    context.folder.update_manifest(
        model=replace(
            context.folder.read_manifest().model, bytes=context.original_params * pruned.storage_dtype.itemsize
        ),
        pruned=PrunedModelFacts(
            **asdict(written) | {"folder": "model"},
            class_name=written.architecture,
            decoder_params=kept_params(context.sites, plan) + context.unprunable_block_params,
            dtype=str(pruned.storage_dtype).removeprefix("torch."),
        ),
        selfcheck=SelfCheckFacts(**selfcheck.to_dict()),
    )
    unchecked.rename(context.folder.model_folder)  # from here on model/ exists, is whole, and has passed its check


def _dense_tensors(model: Any, context: RunContext, state: TrainingState) -> Mapping[str, Tensor]:
    """A checkpoint's adapters, or the weights they were merged into, in the dense model's shapes (`expand_tensors`)."""
    tensors = state.tensors["adapters"]
    if not state.is_cut:
        return tensors
    assert state.plan is not None
    return expand_tensors(model, tensors, state.plan, context.sites)


def _cut_in_memory(context: RunContext, state: TrainingState, tokens: Tensor) -> CutModel:
    assert state.plan is not None
    loaded = context.load_dense(torch.float32, torch.device("cpu"))
    gated, merge = loaded.model, _weight_merger(loaded.model, context, state)
    for name, parameter in gated.named_parameters():
        # Rounded to what the file will hold, computed in float32: the comparison is about the cut, not the rounding.
        parameter.data = merge(name, parameter.data).to(loaded.checkpoint_dtype).float()
    with masked(gated, state.plan, sites=context.sites):
        expected = compute_logits(gated, tokens)
    return CutModel(
        cut(gated, state.plan, sites=context.sites).to(loaded.checkpoint_dtype), loaded.checkpoint_dtype, expected
    )


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
