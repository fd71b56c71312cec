"""From a tuned run's last checkpoint to `model/`: merged and cut in one operation, written, opened and compared."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunetune.cost.parameters import total
from prunetune.data.templates import chat_stop, is_chat
from prunetune.export.selfcheck import check, logits_of
from prunetune.export.streamed import Merge, Streamed, cut_streamed
from prunetune.export.write import write
from prunetune.model.safetensors_reader import Stored, skeleton
from prunetune.pipeline.model_card import card
from prunetune.pipeline.nf4_check import compared, tuned_beside
from prunetune.pipeline.prepare import Setting
from prunetune.pruning.cut import cut, merge_adapters
from prunetune.pruning.linears import COLUMNS, ROWS, is_transposed, linear_of, size
from prunetune.pruning.masking import masked
from prunetune.pruning.nf4 import lines_of, round_to_four_bits, rounded
from prunetune.pruning.sites import kept_params, tuned_linears
from prunetune.train.adapters import LARGE, NAME, add_adapters, grow_state, put_back, tunes_all
from prunetune.train.checkpoints import Checkpoints, State
from prunetune.utils.files import write_text

log = logging.getLogger(__name__)


class Cut(NamedTuple):
    """A cut model, and what its gated original says to the tokens of the check."""

    model: Any
    storage: torch.dtype
    expected: Tensor
    shards: Path | None = None  # finished files, where the model has no weights


def finish(setting: Setting, *, streamed: bool = False) -> None:
    """Cut from the dense weights as they are stored, a large model's with one layer in memory at a time.

    `streamed`: any model's.
    """
    setting.console.stage("cut, write and check", 0)
    state = Checkpoints(setting.folder.checkpoints).latest()
    assert state is not None
    assert state.plan is not None
    tokens = _check_tokens(setting)
    streamer = _streamer(setting, state) if streamed or _is_large(setting) else None
    small = _whole(setting, state, tokens) if streamer is None else _streamed(setting, streamer, state, tokens)
    if tuned_beside(setting, state):
        setting.folder.note(quantised=_against_tuned(setting, state, tokens, small.expected))
    write_text(setting.folder.plan, state.plan.to_json())
    unchecked = setting.folder.path / "model.unchecked"
    written = write(
        small.model,
        setting.tokenizer,
        state.plan,
        setting.sites,
        unchecked,
        layout=setting.config.layout,
        card=card(setting.folder, setting.config, state.plan, setting.sites),
        shards=small.shards,
        end=_chat_stop(setting),
    )
    found = check(written, tokens, small.expected, streamed=streamer is not None)
    setting.folder.note(
        model=setting.folder.manifest()["model"] | {"bytes": setting.params * small.storage.itemsize},
        pruned=asdict(written)
        | {
            "folder": "model",
            "class": written.architecture,
            "decoder_params": kept_params(setting.sites, state.plan) + setting.whole,
            "dtype": str(small.storage).removeprefix("torch."),
        },
        selfcheck=found.to_dict(),
    )
    unchecked.rename(setting.folder.model)  # from here on model/ exists, is whole, and has passed its check


def _chat_stop(setting: Setting) -> int | None:
    """Where an answer is over, if the model was tuned on turns of a chat."""
    chats = any(is_chat(record, setting.config.data.template) for record in setting.splits.train)
    return chat_stop(setting.tokenizer) if chats else None


def _against_tuned(setting: Setting, state: State, tokens: Tensor, expected: Tensor) -> dict[str, Any]:
    """The model as it was tuned, in 4 bits, against what the merged one says."""
    assert state.plan is not None
    base = setting.to_train()
    _put_adapters(base, setting, state)
    return compared(base, state.plan, setting, tokens, expected)


def _is_large(setting: Setting) -> bool:
    """Whether weights would fill a computer's memory, and what was learnt about them is in adapters."""
    return total(setting.sites) >= LARGE and not tunes_all(setting.config.train, setting.sites)


def _whole(setting: Setting, state: State, tokens: Tensor) -> Cut:
    assert state.plan is not None
    loaded = setting.load(torch.float32, torch.device("cpu"))
    gated = loaded.model
    if tuned_beside(setting, state):  # merged is what was tuned: adapters know the rounded weights only
        round_to_four_bits(gated, setting.sites, dtype=setting.dtype, device=setting.device)
    _put_adapters(gated, setting, state)
    merge_adapters(gated)
    for parameter in gated.parameters():
        # Rounded to what the file will hold, computed in float32: the comparison is about the cut, not the rounding.
        parameter.data = parameter.data.to(loaded.storage).float()
    with masked(gated, state.plan, sites=setting.sites):
        expected = logits_of(gated, tokens)
    return Cut(cut(gated, state.plan, sites=setting.sites).to(loaded.storage), loaded.storage, expected)


def _put_adapters(model: Any, setting: Setting, state: State) -> None:
    """A checkpoint's adapters, or the weights they were merged into, on a dense model: zero for removed units."""
    if not (state.is_cut and tunes_all(setting.config.train, setting.sites)):
        add_adapters(model, setting.sites, setting.config.lora, seed=0)
    put_back(model, state, setting.sites, setting.config.train)


# -- layer by layer ----------------------------------------------------------------------------------------------------


def _streamer(setting: Setting, state: State) -> Streamed | None:
    """None where weights are not stored under the names that they have in memory."""
    name, trust = setting.config.model, setting.config.trust_remote_code
    model, stored = skeleton(name, trust_remote_code=trust), Stored.of(name, trust_remote_code=trust)
    if not stored.has(name for name, _ in model.named_parameters()):
        log.warning("the model's files use other names than its class: it is cut as a whole, in the memory of the CPU")
        return None
    return Streamed(model, stored, _merge(model, setting, state))


def _streamed(setting: Setting, streamer: Streamed, state: State, tokens: Tensor) -> Cut:
    assert state.plan is not None
    shards = setting.folder.path / "model.shards"
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir()
    expected = cut_streamed(streamer, state.plan, setting.sites, tokens, shards)
    return Cut(streamer.model, streamer.storage, expected, shards)


def _merge(model: Any, setting: Setting, state: State) -> Merge:
    """What `merge_adapters` adds, weight by weight."""
    assert state.plan is not None
    rank, settings = setting.config.lora.rank, setting.config.lora
    linears = {name: linear_of(model, name) for name in tuned_linears(model)}
    shapes = {f"{name}.lora_A.{NAME}.weight": torch.Size((rank, size(linears[name], COLUMNS))) for name in linears}
    shapes |= {f"{name}.lora_B.{NAME}.weight": torch.Size((size(linears[name], ROWS), rank)) for name in linears}
    weights: Mapping[str, Tensor] = state.tensors["adapters"]
    grown = grow_state(weights, shapes, state.plan, setting.sites) if state.is_cut else weights
    scale = (settings.alpha or 2 * rank) / rank
    held = lines_of(model, setting.sites) if tuned_beside(setting, state) else {}

    def merged(name: str, weight: Tensor) -> Tensor:
        linear = name.removesuffix(".weight")
        if linear not in linears or not name.endswith(".weight"):
            return weight
        if linear in held:
            how: Any = {"lines": held[linear], "dtype": setting.dtype, "device": setting.device}
            weight = rounded(linears[linear], weight, **how).to(weight)
        delta = grown[f"{linear}.lora_B.{NAME}.weight"] @ grown[f"{linear}.lora_A.{NAME}.weight"] * scale
        return weight + (delta.t() if is_transposed(linears[linear]) else delta)

    return merged


def _check_tokens(setting: Setting) -> Tensor:
    """[B, T] ids of real examples, at most 4 of 64 tokens, cut to equal length."""
    examples = setting.encoded["test"].examples[:4]
    length = min(64, *(len(example.ids) for example in examples)) if examples else 1
    return torch.tensor([example.ids[:length] for example in examples])
