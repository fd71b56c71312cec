"""Which rows and columns belong together: what a model's own configuration says, and a table for what it does not.

`transformers` configurations carry `base_model_tp_plan`: column-wise linears produce a hidden width and one row-wise
linear consumes it. That is just the coupling that structural pruning needs (ask, then look up, then refuse).
docs/add-an-architecture.md says what a new family takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from prunetune.errors import UnknownArchitecture
from prunetune.pruning.linears import unwrap_adapter
from prunetune.pruning.units import UnitKind


@dataclass(frozen=True)
class BlockLinears:
    """The linears of one block, by their names inside a layer."""

    producers: tuple[str, ...]  # "self_attn.q_proj", ...
    consumer: str  # "self_attn.o_proj"

    @property
    def module(self) -> str:
        """The module that holds them; "" where it is the layer itself."""
        return self.consumer.rpartition(".")[0]


@dataclass(frozen=True)
class MixtureOfExperts:
    """Experts in fused parameters, [E, ...] each, and the router that picks some of them for every token."""

    router: str = "mlp.gate"
    intermediate_size_key: str = "moe_intermediate_size"  # the configuration's name for the channels of an expert
    transposed: bool = False  # weights as [E, in, out]
    interleaved: bool = False  # gate and up side by side, channel by channel, not one above the other
    returns_scores: bool = False  # the block gives (output, router scores)

    block: str = "mlp"
    experts: str = "mlp.experts"


@dataclass(frozen=True)
class Family:
    """One architecture: what its configuration cannot tell."""

    tp_plan: Mapping[str, str] = field(default_factory=dict)  # as base_model_tp_plan, where the configuration has none
    intermediate_size_key: str = (
        "intermediate_size"  # the configuration's name for the channels of an MLP; "" where it has none
    )
    unprunable: Mapping[UnitKind, str] = field(default_factory=dict)  # blocks that cannot be pruned, and why
    mixture: MixtureOfExperts | None = None
    attention_sinks: str = ""  # one learnt logit for each query head, beside the projections
    adds_residual: bool = False  # its attention is handed the residual and gives it back


DERIVED = "its head dimension is the hidden size divided by the heads, so no head can leave"
EXPERTS = "its channels are in experts: see experts and expert-channels"
SPANNING = "its norms of queries or keys hold more than one head's weights"
RESIDUAL = "its attention adds the residual itself, so that its output is more than its own"
LAST_NORM = "it normalises after the residual, so that an empty layer would change what passes"
BY_DEPTH = "scale_attn_by_inverse_layer_idx ties a layer's weights to its place in the stack"
SINGLE = "every KV group has one query head"
NO_EXPERTS = "it is no mixture of experts"
ATTENTION_PLAN = {f"self_attn.{name}_proj": "colwise" for name in "qkv"} | {"self_attn.o_proj": "rowwise"}

# Families whose sites were cut and compared with their masked form; the law tests run over each of them.
FAMILIES: Mapping[str, Family] = {
    **{
        name: Family()
        for name in (
            "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi",
            "phi3", "smollm3", "granite", "starcoder2", "olmo", "olmo2", "olmo3", "glm", "glm4", "cohere", "cohere2",
            "seed_oss", "helium", "nemotron", "arcee", "exaone4", "ernie4_5", "apertus", "jais2",
        )
    },
    "mixtral": Family(mixture=MixtureOfExperts(intermediate_size_key="intermediate_size")),
    "qwen2_moe": Family(mixture=MixtureOfExperts()),
    "qwen3_moe": Family(mixture=MixtureOfExperts()),
    "gpt_oss": Family(
        tp_plan=ATTENTION_PLAN,
        attention_sinks="self_attn.sinks",
        mixture=MixtureOfExperts(
            router="mlp.router", intermediate_size_key="intermediate_size", transposed=True, interleaved=True, returns_scores=True
        ),
    ),
    "gpt2": Family(
        tp_plan={"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}, intermediate_size_key="n_inner", unprunable={"attention": DERIVED}
    ),
    "gpt_neox": Family(unprunable={"attention": DERIVED}),
    "stablelm": Family(
        tp_plan={"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"},
        unprunable={"attention": DERIVED},
    ),
    "opt": Family(tp_plan={"fc1": "colwise", "fc2": "rowwise"}, intermediate_size_key="ffn_dim", unprunable={"attention": DERIVED}),
    "falcon": Family(
        tp_plan={"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"},
        intermediate_size_key="ffn_hidden_size",
        unprunable={"attention": DERIVED},
    ),
    "bloom": Family(
        tp_plan={"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"},
        intermediate_size_key="",
        unprunable={"attention": DERIVED, "attention-blocks": RESIDUAL},
        adds_residual=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class HeadCounts:
    """The heads of every layer, as the configuration has them."""

    query_heads: int
    kv_heads: int  # of query heads, each with one key-value head
    head_dim: int  # rows of a head

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads in a group."""
        return self.query_heads // self.kv_heads


def head_counts(config: Any) -> HeadCounts:
    """Read off a configuration, with what `transformers` takes where it says nothing."""
    queries = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or queries
    return HeadCounts(queries, groups, getattr(config, "head_dim", None) or config.hidden_size // queries)


def num_experts_key(config: Any) -> str:
    """The configuration's own name for the number of experts."""
    return str(config.attribute_map.get("num_experts", "num_experts"))


@dataclass(frozen=True)
class ArchitectureInfo:
    """All that `sites` needs to know of an architecture."""

    layer_prefixes: tuple[str, ...]  # "model.layers.0", ...
    heads: HeadCounts
    blocks: Mapping[UnitKind, BlockLinears]  # attention and MLP; one that cannot be sliced is not there ...
    unprunable: Mapping[UnitKind, str]  # ... but here: kinds that cannot be pruned, with the reason
    layer_types: tuple[str, ...]
    attention_name: str  # the attention module, as named inside a layer
    mlp: (
        BlockLinears | None
    )  # the linears of a plain MLP, also of one that only goes as a whole: in some layers of a mixture
    family: Family
    experts_per_token: int  # experts that a token goes to

    def layer_type(self, layer: int) -> str:
        """The attention type of a layer: "full_attention", "sliding_attention"."""
        return self.layer_types[layer]


def get_family(config: Any) -> Family:
    """The table's entry; raises `UnknownArchitecture`."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnknownArchitecture(
            f"architecture {config.model_type!r} is not known; known are {', '.join(FAMILIES)}; "
            "docs/add-an-architecture.md says what a new one takes"
        )
    return family


def architecture_info(model: nn.Module) -> ArchitectureInfo:
    """Read the coupling off a causal language model of `transformers`; refuse rather than guess."""
    config = cast(Any, model).config
    family = get_family(config)
    found = _blocks(family.tp_plan or _inside_layers(config.base_model_tp_plan or {}))
    prefixes, heads = _layers(model), head_counts(config)
    attention = _attention(model.get_submodule(prefixes[0]), prefixes[0])
    whole = _refusals(config, family, heads) | dict(family.unprunable)
    if "attention" in found and _has_wide_norm(model.get_submodule(f"{prefixes[0]}.{attention}"), heads.head_dim):
        whole["attention"] = SPANNING
    if "attention" in whole:
        whole["query-heads"] = whole["attention"]
    blocks = {kind: block for kind, block in found.items() if kind not in whole}
    missing = {"attention", "mlp"} - set(blocks) - set(whole)
    if missing:
        raise UnknownArchitecture(
            f"{config.model_type!r} names no {' and no '.join(sorted(missing))} block of producers and a consumer "
            "in its tensor-parallel plan; docs/add-an-architecture.md says how to give one"
        )
    return ArchitectureInfo(
        layer_prefixes=prefixes,
        heads=heads,
        blocks=blocks,
        unprunable=whole,
        layer_types=tuple(getattr(config, "layer_types", None) or ("full_attention",) * len(prefixes)),
        attention_name=attention,
        mlp=found.get("mlp"),
        family=family,
        experts_per_token=config.num_experts_per_tok if family.mixture else 0,
    )


def _refusals(config: Any, family: Family, heads: HeadCounts) -> dict[UnitKind, str]:
    """Kinds of unit that this configuration rules out."""
    found: dict[UnitKind, str] = {}
    if family.mixture is None:
        found |= {"experts": NO_EXPERTS, "expert-channels": NO_EXPERTS}
    else:
        found["mlp"] = EXPERTS
    if heads.queries_per_kv_head < 2:
        found["query-heads"] = SINGLE
    if not getattr(config, "do_layer_norm_before", True):
        found |= {"layers": LAST_NORM}
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        found["layers"] = BY_DEPTH
    return found


def _attention(layer: nn.Module, prefix: str) -> str:
    found = [name for name, child in layer.named_children() if "Attention" in type(child).__name__]
    if len(found) != 1:
        raise UnknownArchitecture(f"{prefix} has {len(found)} attention modules, and one is needed")
    return found[0]


def _has_wide_norm(attention: nn.Module, head_dim: int) -> bool:
    """Whether a part that is no linear has weights for more than one head: OLMo 2, Cohere with use_qk_norm."""
    parts = (part for part in attention.children() if not isinstance(unwrap_adapter(part), nn.Linear))
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


def _blocks(plan: Mapping[str, str]) -> dict[UnitKind, BlockLinears]:
    """Group linears by block: column-wise ones produce, the row-wise one consumes."""
    producers: dict[UnitKind, list[str]] = {}
    consumers: dict[UnitKind, str] = {}
    for name, style in plan.items():
        kind: UnitKind = "attention" if "attn" in name or "attention" in name else "mlp"
        if style.startswith("colwise"):
            producers.setdefault(kind, []).append(name)
        elif style.startswith("rowwise"):
            consumers[kind] = name
    return {kind: BlockLinears(tuple(names), consumers[kind]) for kind, names in producers.items() if kind in consumers}
