"""Which rows and columns belong together: what a model's own configuration says, and a table for what it does not.

`transformers` configurations carry `base_model_tp_plan`: column-wise linears produce a hidden width and one row-wise
linear consumes it. That is just the coupling that structural pruning needs (ask, then look up, then refuse).
docs/add-an-architecture.md says what a new family takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import nn

from prunetune.errors import UnknownArchitecture

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Block:
    """The linears of one block, by their names inside a layer."""

    producers: tuple[str, ...]  # "self_attn.q_proj", ...
    consumer: str  # "self_attn.o_proj"

    @property
    def module(self) -> str:
        """The module that holds them; "" where it is the layer itself."""
        return self.consumer.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """One architecture: what its configuration cannot tell."""

    plan: Mapping[str, str] = field(default_factory=dict)  # as base_model_tp_plan, where the configuration has none
    width: str = "intermediate_size"  # the configuration's name for the channels of an MLP; "" where it has none
    whole: Mapping[Kind, str] = field(default_factory=dict)  # blocks that cannot be pruned, and why


DERIVED = "its head dimension is the hidden size divided by the heads, so no head can leave"
EXPERTS = "its channels are in experts, which cannot be pruned yet"
SPANNING = "its norms of queries or keys hold more than one head's weights"
MIXTURE = Family(whole={"mlp": EXPERTS})

# Families whose sites were cut and compared with their masked form; the law tests run over each of them.
FAMILIES: Mapping[str, Family] = {
    **{
        name: Family()
        for name in (
            "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi",
            "phi3", "smollm3", "granite", "starcoder2", "olmo", "olmo2", "olmo3", "glm", "glm4", "cohere", "cohere2",
            "seed_oss", "helium", "nemotron", "arcee", "exaone4", "ernie4_5", "apertus",
        )
    },
    "mixtral": MIXTURE,
    "qwen2_moe": MIXTURE,
    "qwen3_moe": MIXTURE,
    "gpt_neox": Family(whole={"attention": DERIVED}),
    "stablelm": Family(
        plan={"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"},
        whole={"attention": DERIVED},
    ),
    "opt": Family(plan={"fc1": "colwise", "fc2": "rowwise"}, width="ffn_dim", whole={"attention": DERIVED}),
    "falcon": Family(
        plan={"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"},
        width="ffn_hidden_size",
        whole={"attention": DERIVED},
    ),
    "bloom": Family(
        plan={"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"}, width="", whole={"attention": DERIVED}
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """The heads of every layer, as the configuration has them."""

    queries: int
    groups: int  # of query heads, each with one key-value head
    size: int  # rows of a head

    @property
    def ratio(self) -> int:
        """Query heads in a group."""
        return self.queries // self.groups


def heads_of(config: Any) -> Heads:
    """Read off a configuration, with what `transformers` takes where it says nothing."""
    queries = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, groups, getattr(config, "head_dim", None) or config.hidden_size // queries)


@dataclass(frozen=True)
class Coupling:
    """All that `sites` needs to know of an architecture."""

    layer_prefixes: tuple[str, ...]  # "model.layers.0", ...
    heads: Heads
    blocks: Mapping[Kind, Block]  # a kind that cannot be pruned is not there ...
    whole: Mapping[Kind, str]  # ... but here, with the reason
    layer_types: tuple[str, ...]

    def layer_type(self, layer: int) -> str:
        """The attention type of a layer: "full_attention", "sliding_attention"."""
        return self.layer_types[layer]


def family_of(config: Any) -> Family:
    """The table's entry; raises `UnknownArchitecture`."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnknownArchitecture(
            f"architecture {config.model_type!r} is not known; known are {', '.join(FAMILIES)}; "
            "docs/add-an-architecture.md says what a new one takes"
        )
    return family


def coupling_of(model: nn.Module) -> Coupling:
    """Read the coupling off a causal language model of `transformers`; refuse rather than guess."""
    config = cast(Any, model).config
    family = family_of(config)
    found = _blocks(family.plan or _inside_layers(config.base_model_tp_plan or {}))
    prefixes, whole = _layers(model), dict(family.whole)
    heads = heads_of(config)
    if "attention" in found and _has_wide_norm(
        model.get_submodule(f"{prefixes[0]}.{found['attention'].module}"), heads.size
    ):
        whole["attention"] = SPANNING
    blocks = {kind: block for kind, block in found.items() if kind not in whole}
    missing = {"attention", "mlp"} - set(blocks) - set(whole)
    if missing:
        raise UnknownArchitecture(
            f"{config.model_type!r} names no {' and no '.join(sorted(missing))} block of producers and a consumer "
            "in its tensor-parallel plan; docs/add-an-architecture.md says how to give one"
        )
    return Coupling(
        layer_prefixes=prefixes,
        heads=heads,
        blocks=blocks,
        whole=whole,
        layer_types=tuple(getattr(config, "layer_types", None) or ("full_attention",) * len(prefixes)),
    )


def _has_wide_norm(attention: nn.Module, head_dim: int) -> bool:
    """Whether a part that is no linear has weights for more than one head: OLMo 2, Cohere with use_qk_norm."""
    parts = (part for part in attention.children() if not isinstance(getattr(part, "base_layer", part), nn.Linear))
    return any(weight.numel() > head_dim for part in parts for weight in part.parameters())


def _layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder's layers: its one list of modules, as long as the configuration says."""
    decoder = cast(Any, model).get_decoder()
    base = next(name for name, module in model.named_modules() if module is decoder)
    count = cast(Any, model).config.num_hidden_layers
    lists = [
        name for name, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(lists) != 1:
        raise UnknownArchitecture(f"{base} has {len(lists)} lists of {count} layers, and one is needed")
    return tuple(f"{base}.{lists[0]}.{index}" for index in range(count))


def _inside_layers(tp_plan: Mapping[str, str]) -> dict[str, str]:
    parts = {pattern.partition(".*.")[2]: style for pattern, style in tp_plan.items() if pattern.startswith("layers.")}
    return {name: style for name, style in parts.items() if name.count(".") == 1}  # deeper ones are of experts


def _blocks(plan: Mapping[str, str]) -> dict[Kind, Block]:
    """Group linears by block: column-wise ones produce, the row-wise one consumes."""
    producers: dict[Kind, list[str]] = {}
    consumers: dict[Kind, str] = {}
    for name, style in plan.items():
        kind: Kind = "attention" if "attn" in name or "attention" in name else "mlp"
        if style.startswith("colwise"):
            producers.setdefault(kind, []).append(name)
        elif style.startswith("rowwise"):
            consumers[kind] = name
    return {kind: Block(tuple(names), consumers[kind]) for kind, names in producers.items() if kind in consumers}
