"""Which rows and columns belong together: what a model's own configuration says, and a table for what it does not.

`transformers` configurations carry `base_model_tp_plan`: column-wise linears produce a hidden width and one row-wise
linear consumes it. That is just the coupling that structural pruning needs (ask, then look up, then refuse).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from prunetune.errors import UnknownArchitecture

# Families whose sites were cut and compared with their masked form; the law tests run over each of them.
TRIED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@dataclass(frozen=True)
class Block:
    """The linears of one block, by their names inside a layer."""

    producers: tuple[str, ...]  # "self_attn.q_proj", ...
    consumer: str  # "self_attn.o_proj"
    key: str = ""  # attention only: the producer with one head per group


@dataclass(frozen=True)
class Coupling:
    """All that `sites` needs to know of an architecture."""

    layer_prefixes: tuple[str, ...]  # "model.layers.0", ...
    head_dim: int
    attention: Block
    mlp: Block
    layer_types: tuple[str, ...]

    def layer_type(self, layer: int) -> str:
        """The attention type of a layer: "full_attention", "sliding_attention"."""
        return self.layer_types[layer]


def coupling_of(model: nn.Module) -> Coupling:
    """Read the coupling off a causal language model of `transformers`; refuse rather than guess."""
    config = cast(Any, model).config
    if config.model_type not in TRIED:
        raise UnknownArchitecture(f"architecture {config.model_type!r} is not known; known are {', '.join(TRIED)}")
    tp_plan: Mapping[str, str] = config.base_model_tp_plan or {}
    blocks = _blocks(tp_plan)
    if set(blocks) != {"self_attn", "mlp"}:
        raise UnknownArchitecture(
            f"{config.model_type!r} names blocks {sorted(blocks)} in its tensor-parallel plan; "
            "self_attn and mlp are needed"
        )
    layers = len(cast(Any, model).get_decoder().layers)
    base = f"{cast(Any, model).base_model_prefix}.layers"
    return Coupling(
        layer_prefixes=tuple(f"{base}.{index}" for index in range(layers)),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        attention=blocks["self_attn"],
        mlp=blocks["mlp"],
        layer_types=tuple(getattr(config, "layer_types", None) or ("full_attention",) * layers),
    )


def _blocks(tp_plan: Mapping[str, str]) -> dict[str, Block]:
    """Group "layers.*.<block>.<linear>" entries by block: column-wise ones produce, the row-wise one consumes."""
    producers: dict[str, list[str]] = {}
    consumers: dict[str, str] = {}
    for pattern, style in tp_plan.items():
        head, _, inside = pattern.partition(".*.")
        block = inside.partition(".")[0]
        if head != "layers":
            continue
        if style == "colwise":
            producers.setdefault(block, []).append(inside)
        elif style == "rowwise":
            consumers[block] = inside
    keys = {block: next((name for name in names if name.endswith("k_proj")), "") for block, names in producers.items()}
    return {
        block: Block(tuple(producers[block]), consumers[block], keys[block])
        for block in producers
        if block in consumers
    }
