"""From a tuned run's last checkpoint to `model/`: merged and cut in one operation, written, opened and compared."""

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
from prunetune.export.streamed_cut import AdapterMerger, StreamedModel, cut_streamed
from prunetune.manifest import PrunedModelFacts, QuantisedFacts, SelfCheckFacts
from prunetune.model.safetensors_reader import SafetensorsReader, load_empty_model
from prunetune.pipeline.model_card import render_card
from prunetune.pipeline.nf4_check import compare_with_merged, has_nf4_adapters
from prunetune.pipeline.prepare import RunContext
from prunetune.pruning.cut import cut, merge_adapters
from prunetune.pruning.linears import COLUMNS, ROWS, axis_size, get_base_linear, is_transposed
from prunetune.pruning.masking import masked
from prunetune.pruning.nf4 import cut_axes, round_linears_to_nf4, round_to_nf4
from prunetune.pruning.sites import kept_params, lora_target_modules
from prunetune.train.adapters import (
    ADAPTER_NAME,
    LARGE_MODEL_PARAMS,
    add_adapters,
    expand_adapter_tensors,
    load_into_dense,
    trains_all_weights,
)
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)


class CutModel(NamedTuple):
    """A cut model, and what its gated original says to the tokens of the check."""

    model: Any
    storage_dtype: torch.dtype
    expected_logits: Tensor
    shards: Path | None = None  # finished files, where the model has no weights


def finish(context: RunContext, *, streamed: bool = False) -> None:
    """Cut from the dense weights as they are stored, a large model's with one layer in memory at a time.

    `streamed`: any model's.
    """
    context.console.stage("cut, write and check", 0)
    state = Checkpoints(context.folder.checkpoints).latest()
    assert state is not None
    assert state.plan is not None
    tokens = _check_tokens(context)
    streamer = _open_streamed(context, state) if streamed or _is_large(context) else None
    small = (
        _cut_in_memory(context, state, tokens)
        if streamer is None
        else _cut_layer_by_layer(context, streamer, state, tokens)
    )
    if has_nf4_adapters(context, state):
        compared = _compare_with_tuned(context, state, tokens, small.expected_logits)
        context.folder.update_manifest(quantised=QuantisedFacts(**compared))
    write_text(context.folder.plan_file, state.plan.to_json())
    unchecked = context.folder.path / "model.unchecked"
    written = write_checkpoint(
        small.model,
        context.tokenizer,
        state.plan,
        context.sites,
        unchecked,
        layout=context.config.layout,
        card=render_card(context.folder, context.config, state.plan, context.sites),
        shards=small.shards,
        end_token=_chat_stop(context),
    )
    found = check_checkpoint(written, tokens, small.expected_logits, streamed=streamer is not None)
    context.folder.update_manifest(
        model=replace(context.folder.read_manifest().model, bytes=context.dense_params * small.storage_dtype.itemsize),
        pruned=PrunedModelFacts(
            **asdict(written) | {"folder": "model"},
            class_name=written.architecture,
            decoder_params=kept_params(context.sites, state.plan) + context.unprunable_block_params,
            dtype=str(small.storage_dtype).removeprefix("torch."),
        ),
        selfcheck=SelfCheckFacts(**found.to_dict()),
    )
    unchecked.rename(context.folder.model_folder)  # from here on model/ exists, is whole, and has passed its check


def _chat_stop(context: RunContext) -> int | None:
    """Where an answer is over, if the model was tuned on turns of a chat."""
    chats = any(uses_chat_template(record, context.config.data.template) for record in context.splits.train)
    return chat_stop_id(context.tokenizer) if chats else None


def _compare_with_tuned(
    context: RunContext, state: TrainingState, tokens: Tensor, expected_logits: Tensor
) -> dict[str, Any]:
    """The model as it was tuned, in 4 bits, against what the merged one says."""
    assert state.plan is not None
    base = context.load_for_training()
    _load_adapters(base, context, state)
    return compare_with_merged(base, state.plan, context, tokens, expected_logits)


def _is_large(context: RunContext) -> bool:
    """Whether weights would fill a computer's memory, and what was learnt about them is in adapters."""
    return prunable_params(context.sites) >= LARGE_MODEL_PARAMS and not trains_all_weights(
        context.config.train, context.sites
    )


def _cut_in_memory(context: RunContext, state: TrainingState, tokens: Tensor) -> CutModel:
    assert state.plan is not None
    loaded = context.load_dense(torch.float32, torch.device("cpu"))
    gated = loaded.model
    if has_nf4_adapters(context, state):  # merged is what was tuned: adapters know the rounded weights only
        round_linears_to_nf4(gated, context.sites, dtype=context.dtype, device=context.device)
    _load_adapters(gated, context, state)
    merge_adapters(gated)
    for parameter in gated.parameters():
        # Rounded to what the file will hold, computed in float32: the comparison is about the cut, not the rounding.
        parameter.data = parameter.data.to(loaded.checkpoint_dtype).float()
    with masked(gated, state.plan, sites=context.sites):
        expected = compute_logits(gated, tokens)
    return CutModel(
        cut(gated, state.plan, sites=context.sites).to(loaded.checkpoint_dtype), loaded.checkpoint_dtype, expected
    )


def _load_adapters(model: Any, context: RunContext, state: TrainingState) -> None:
    """A checkpoint's adapters, or the weights they were merged into, on a dense model: zero for removed units."""
    if not (state.is_cut and trains_all_weights(context.config.train, context.sites)):
        add_adapters(model, context.sites, context.config.lora, seed=0)
    load_into_dense(model, state, context.sites, context.config.train)


# -- layer by layer ----------------------------------------------------------------------------------------------------


def _open_streamed(context: RunContext, state: TrainingState) -> StreamedModel | None:
    """None where weights are not stored under the names that they have in memory."""
    name, trust = context.config.model, context.config.trust_remote_code
    model, stored = (
        load_empty_model(name, trust_remote_code=trust),
        SafetensorsReader.from_model(name, trust_remote_code=trust),
    )
    if not stored.has_all(name for name, _ in model.named_parameters()):
        log.warning("the model's files use other names than its class: it is cut as a whole, in the memory of the CPU")
        return None
    return StreamedModel(model, stored, _adapter_merge(model, context, state))


def _cut_layer_by_layer(context: RunContext, streamer: StreamedModel, state: TrainingState, tokens: Tensor) -> CutModel:
    assert state.plan is not None
    shards = context.folder.path / "model.shards"
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir()
    expected = cut_streamed(streamer, state.plan, context.sites, tokens, shards)
    return CutModel(streamer.model, streamer.storage_dtype, expected, shards)


def _adapter_merge(model: Any, context: RunContext, state: TrainingState) -> AdapterMerger:
    """What `merge_adapters` adds, weight by weight."""
    assert state.plan is not None
    rank, settings = context.config.lora.rank, context.config.lora
    linears = {name: get_base_linear(model, name) for name in lora_target_modules(model)}
    shapes = {
        f"{name}.lora_A.{ADAPTER_NAME}.weight": torch.Size((rank, axis_size(linears[name], COLUMNS)))
        for name in linears
    }
    shapes |= {
        f"{name}.lora_B.{ADAPTER_NAME}.weight": torch.Size((axis_size(linears[name], ROWS), rank)) for name in linears
    }
    weights: Mapping[str, Tensor] = state.tensors["adapters"]
    grown = expand_adapter_tensors(weights, shapes, state.plan, context.sites) if state.is_cut else weights
    scale = (settings.alpha or 2 * rank) / rank
    held = cut_axes(model, context.sites) if has_nf4_adapters(context, state) else {}

    def merged(name: str, weight: Tensor) -> Tensor:
        linear = name.removesuffix(".weight")
        if linear not in linears or not name.endswith(".weight"):
            return weight
        if linear in held:
            how: Any = {"lines": held[linear], "dtype": context.dtype, "device": context.device}
            weight = round_to_nf4(linears[linear], weight, **how).to(weight)
        delta = (
            grown[f"{linear}.lora_B.{ADAPTER_NAME}.weight"] @ grown[f"{linear}.lora_A.{ADAPTER_NAME}.weight"] * scale
        )
        return weight + (delta.t() if is_transposed(linears[linear]) else delta)

    return merged


def _check_tokens(context: RunContext) -> Tensor:
    """[B, T] ids of real examples, at most 4 of 64 tokens, cut to equal length."""
    examples = context.encoded["test"].examples[:4]
    length = min(64, *(len(example.token_ids) for example in examples)) if examples else 1
    return torch.tensor([example.token_ids[:length] for example in examples])
