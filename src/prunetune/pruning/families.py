"""The supported architectures, and which of their linears belong together.

`transformers` configurations carry `base_model_tp_plan`: column-wise linears produce a hidden width and one row-wise
linear consumes it, which is the coupling that structural pruning needs. `FAMILIES` says what a configuration does not,
and architectures without an entry are refused. docs/extend/family.md says how to add one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from prunetune.errors import UnknownArchitecture
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
    """Where a layer has its experts, in fused parameters of [E, ...] each, and the router that picks some per token."""

    router: str = "mlp.gate"
    intermediate_size_key: str = "moe_intermediate_size"  # the configuration's name for the channels of an expert
    transposed: bool = False  # weights are [E, in, out]
    interleaved: bool = False  # gate and up rows alternate, channel by channel
    returns_scores: bool = False  # the block returns (output, router scores)
    block: str = "mlp"  # the module of router and experts
    experts: str = "mlp.experts"


@dataclass(frozen=True)
class Family:
    """What the configuration of one architecture does not say. Names are those inside a layer."""

    tp_plan: Mapping[str, str] = field(default_factory=dict)  # where the configuration has no base_model_tp_plan
    intermediate_size_key: str = "intermediate_size"  # the configuration's name for an MLP's channels; "": it has none
    unprunable: Mapping[UnitKind, str] = field(default_factory=dict)  # kinds that cannot be pruned, and why
    mixture: MixtureOfExperts | None = None
    attention_sinks: str = ""  # the parameter with one learnt logit for each query head
    adds_residual: bool = False  # attention takes the residual and returns the sum


HEAD_DIM_DERIVED = "its head dimension is the hidden size divided by the heads, so no head can be removed"
NO_HEADS = {UnitKind.KV_GROUP: HEAD_DIM_DERIVED}
IN_EXPERTS = "its channels are in experts: see experts and expert-channels"
WIDE_NORM = "its norms of queries or keys hold more than one head's weights"
OWN_SIZES = "its layers have heads of different sizes"
ADDS_RESIDUAL = "its attention adds the residual itself, so that its output is more than its own"
POST_NORM = "it normalises after the residual, so that an empty layer would change what passes"
SCALED_BY_DEPTH = "scale_attn_by_inverse_layer_idx ties a layer's weights to its place in the stack"
ONE_QUERY_HEAD = "every KV group has one query head"
NO_ATTENTION = " without attention"  # ends the type of a hybrid's layer of another make
NO_EXPERTS = "it is no mixture of experts"
HEADS_FILL_HIDDEN = "its class makes heads that fill the hidden size"
IN_WRAPPER = "what a multimodal model makes of images is written into them"
OTHER_NORM = " takes a mean of all channels out, or has no weight, and only RMSNorm can do without some of them"
ATTENTION_PLAN = {f"self_attn.{name}_proj": "colwise" for name in "qkv"} | {"self_attn.o_proj": "rowwise"}

# Architectures whose configuration says all that is needed.
DESCRIBED_BY_CONFIG = (
    "llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "smollm3", "granite", "starcoder2", "olmo", "olmo2", "olmo3", "glm", "glm4", "cohere", "cohere2", "seed_oss",
    "nemotron", "arcee", "exaone4", "ernie4_5", "apertus", "jais2",
)  # fmt: skip

# tests/pruning/test_units.py prunes every family here, and compares the result with the masked model.
FAMILIES: dict[str, Family] = {
    **{name: Family() for name in DESCRIBED_BY_CONFIG},
    "helium": Family(unprunable={UnitKind.HIDDEN_CHANNEL: HEADS_FILL_HIDDEN}),
    "mixtral": Family(mixture=MixtureOfExperts(intermediate_size_key="intermediate_size")),
    "qwen2_moe": Family(mixture=MixtureOfExperts()),
    "qwen3_moe": Family(mixture=MixtureOfExperts()),
    "gpt_oss": Family(
        tp_plan=ATTENTION_PLAN,
        attention_sinks="self_attn.sinks",
        mixture=MixtureOfExperts(
            router="mlp.router",
            intermediate_size_key="intermediate_size",
            transposed=True,
            interleaved=True,
            returns_scores=True,
        ),
    ),
    "gpt2": Family(
        tp_plan={"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}, intermediate_size_key="n_inner", unprunable=NO_HEADS
    ),
    "gpt_neox": Family(unprunable=NO_HEADS),
    "stablelm": Family(
        tp_plan={"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}, unprunable=NO_HEADS
    ),
    "opt": Family(tp_plan={"fc1": "colwise", "fc2": "rowwise"}, intermediate_size_key="ffn_dim", unprunable=NO_HEADS),
    "falcon": Family(
        tp_plan={"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"},
        intermediate_size_key="ffn_hidden_size",
        unprunable=NO_HEADS,
    ),
    "bloom": Family(
        tp_plan={"mlp.dense_h_to_4h": "colwise", "mlp.dense_4h_to_h": "rowwise"},
        intermediate_size_key="",
        unprunable={**NO_HEADS, UnitKind.ATTENTION_BLOCK: ADDS_RESIDUAL},
        adds_residual=True,
    ),
}


# Text models that exist only inside multimodal models.
INSIDE_WRAPPERS = {
    "qwen2_vl_text": Family(),
    "qwen2_5_vl_text": Family(),
    "qwen3_vl_text": Family(
        tp_plan=ATTENTION_PLAN | {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
    ),
}
MODEL_TYPE_PREFIX = "pruned_"  # of the model_type of a result of layout per-layer


@dataclass(frozen=True)
class HeadCounts:
    """The numbers of heads in a layer."""

    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def queries_per_kv_head(self) -> int:
        return self.query_heads // max(1, self.kv_heads)


def head_counts(config: Any, layer: int = 0) -> HeadCounts:
    """Read a layer's configuration, with the defaults of `transformers` where it says nothing.

    Only of a model with `per_layer_config` do layers differ, and may lack attention. Raises `UnknownArchitecture` for a
    model without attention.
    """
    config = config.get_text_config()
    values = config.per_layer_config[layer]
    queries = getattr(values, "num_attention_heads", None)
    if not queries:
        raise UnknownArchitecture(f"{config.model_type!r} has no attention heads")
    groups = getattr(values, "num_key_value_heads", None) or queries
    head_dim = getattr(values, "head_dim", None) or config.hidden_size // queries
    if "attention" in getattr(values, "skip", ()):
        queries = groups = 0
    return HeadCounts(queries, groups, head_dim)


def num_experts_key(config: Any) -> str:
    """The configuration's own name for the number of experts."""
    config = config.get_text_config()
    mapped = config.attribute_map.get("num_experts", "num_experts")
    names = (mapped, "num_local_experts", "n_routed_experts", "moe_num_experts")
    return str(next((name for name in names if hasattr(config.per_layer_config[0], name)), mapped))


@dataclass(frozen=True)
class ArchitectureInfo:
    """What a model's configuration and its family say about pruning it."""

    layer_prefixes: tuple[str, ...]  # "model.layers.0", ...
    layer_types: tuple[str, ...]  # of attention, by layer: "full_attention", "sliding_attention"
    layer_heads: tuple[HeadCounts, ...]  # by layer
    attention_name: str  # the attention module inside a layer; hybrids have layers without it
    blocks: Mapping[UnitKind, BlockLinears]  # linears by the kind of unit they can be pruned by: KV groups, channels
    mlp: BlockLinears | None  # linears of a plain MLP, also of one between mixtures, which can only be removed whole
    unprunable: Mapping[UnitKind, str]  # kinds that cannot be pruned, with the reason
    family: Family
    experts_per_token: int  # that the router picks; 0 without experts


def get_family(config: Any) -> Family:
    """The entry in `FAMILIES` (of a multimodal model its text model's), else what a small model shows: `family_check`.

    Raises `UnknownArchitecture` where that has nothing that can be cut.
    """
    config = config.get_text_config()
    model_type = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    if family := FAMILIES.get(model_type) or INSIDE_WRAPPERS.get(model_type):
        return family
    from prunetune.pruning.family_check import checked_family  # which finds sites, and so imports this module

    return checked_family(config)


def architecture_info(model: nn.Module) -> ArchitectureInfo:
    """Read a causal language model of `transformers`; raises `UnknownArchitecture` rather than guess."""
    config = cast(Any, model).config.get_text_config()
    family = get_family(config)
    prefixes = layer_prefixes(model)
    layer_heads = tuple(head_counts(config, layer) for layer in range(len(prefixes)))
    heads = max(layer_heads, key=lambda heads: heads.queries_per_kv_head)
    blocks = _blocks(family.tp_plan or plan_inside_layers(config))
    heads_block = blocks.get(UnitKind.KV_GROUP)
    children = model.get_submodule(prefixes[0]).named_children()
    names = [heads_block.module] if heads_block else [n for n, child in children if "Attention" in type(child).__name__]
    if len(names) != 1:
        raise UnknownArchitecture(f"{prefixes[0]} has {len(names)} attention modules, and one is needed")
    attention_name = names[0]
    layers = {prefix: dict(model.get_submodule(prefix).named_modules()) for prefix in prefixes}
    attentions = {
        prefix: modules[attention_name]
        for prefix, modules in layers.items()
        if attention_name in modules and (heads_block is None or heads_block.consumer in modules)
    }

    unprunable: dict[UnitKind, str] = {UnitKind.MLP_CHANNEL: IN_EXPERTS}
    if family.mixture is None:
        unprunable = {UnitKind.EXPERT: NO_EXPERTS, UnitKind.EXPERT_CHANNEL: NO_EXPERTS}
    if heads.queries_per_kv_head < 2:
        unprunable[UnitKind.QUERY_HEAD] = ONE_QUERY_HEAD
    if not getattr(config, "do_layer_norm_before", True):
        unprunable[UnitKind.LAYER] = POST_NORM
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        unprunable[UnitKind.LAYER] = SCALED_BY_DEPTH
    if config is not cast(Any, model).config:
        unprunable[UnitKind.HIDDEN_CHANNEL] = IN_WRAPPER
    else:
        places = (prefixes[0].rpartition(".")[0].rpartition(".")[0], *prefixes)
        for norm in (child for place in places for child in model.get_submodule(place).children()):
            name = type(norm).__name__
            if "Norm" in name and ("RMS" not in name or getattr(norm, "weight", None) is None):
                unprunable[UnitKind.HIDDEN_CHANNEL] = name + OTHER_NORM
                break
    unprunable |= family.unprunable
    if len({heads.head_dim for heads in layer_heads if heads.query_heads}) > 1:  # Gemma 4
        unprunable[UnitKind.KV_GROUP] = OWN_SIZES
    if UnitKind.KV_GROUP in blocks and any(_has_wide_norm(module, heads.head_dim) for module in attentions.values()):
        unprunable[UnitKind.KV_GROUP] = WIDE_NORM
    if UnitKind.KV_GROUP in unprunable:
        unprunable[UnitKind.QUERY_HEAD] = unprunable[UnitKind.KV_GROUP]

    missing = {UnitKind.KV_GROUP, UnitKind.MLP_CHANNEL} - set(blocks) - set(unprunable)
    if missing:
        raise UnknownArchitecture(
            f"{config.model_type!r} names no {' and no '.join(sorted(missing))} block of producers and a consumer "
            "in its tensor-parallel plan; docs/extend/family.md says how to give one"
        )
    stated_types = getattr(config, "layer_types", None) or ("full_attention",) * len(prefixes)
    picks = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
    return ArchitectureInfo(
        layer_prefixes=prefixes,
        layer_types=tuple(
            kind if prefix in attentions else f"{kind}{NO_ATTENTION}"
            for prefix, kind in zip(prefixes, stated_types, strict=True)
        ),
        layer_heads=layer_heads,
        attention_name=attention_name,
        blocks={kind: block for kind, block in blocks.items() if kind not in unprunable},
        mlp=blocks.get(UnitKind.MLP_CHANNEL),
        unprunable=unprunable,
        family=family,
        experts_per_token=int(next(filter(None, (getattr(config, n, 0) for n in picks)))) if family.mixture else 0,
    )


def layer_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the decoder's layers: its only list of modules that is as long as the configuration says."""
    decoder = cast(Any, model).get_decoder()
    while isinstance(inner := getattr(decoder, "model", None), nn.Module):  # Llama 4, and its wrapper
        decoder = inner
    base = next(name for name, module in model.named_modules() if module is decoder)
    count = cast(Any, model).config.get_text_config().num_hidden_layers
    children = decoder.named_children()
    lists = [name for name, child in children if isinstance(child, nn.ModuleList) and len(child) == count]
    lists = [name for name in lists if name == "layers"] or lists
    if len(lists) != 1:
        raise UnknownArchitecture(f"{base} has {len(lists)} lists of {count} layers, and one is needed")
    return tuple(f"{base}.{lists[0]}.{index}" for index in range(count))


def _has_wide_norm(attention: nn.Module, head_dim: int) -> bool:
    """Whether a norm of queries or keys has weights for more than one head: OLMo 2, Cohere with use_qk_norm.

    Norms of latent attention ("q_a_layernorm") are of what all heads read.
    """
    norms = (
        child
        for name, child in attention.named_children()
        if "norm" in type(child).__name__.lower() and "_a_" not in name
    )
    return any(weight.numel() > head_dim for norm in norms for weight in norm.parameters(recurse=False))


def plan_inside_layers(config: Any) -> dict[str, str]:
    """The configuration's plan for linears of a block, by their names inside a layer; deeper names are experts'."""
    tp_plan: Mapping[str, str] = config.base_model_tp_plan or {}
    names = {pattern.partition(".*.")[2]: style for pattern, style in tp_plan.items() if pattern.startswith("layers.")}
    return {name: style for name, style in names.items() if name.count(".") == 1}


def is_of_heads(name: str) -> bool:
    """Whether a linear of this name inside a layer holds heads, and not channels."""
    module, _, leaf = name.rpartition(".")
    return "attn" in module or "attention" in module or leaf in ("q_proj", "k_proj", "v_proj", "o_proj")


def _blocks(tp_plan: Mapping[str, str]) -> dict[UnitKind, BlockLinears]:
    """Group a plan's linears by block: column-wise ones produce, the row-wise one consumes."""
    producers: dict[UnitKind, list[str]] = {}
    consumers: dict[UnitKind, str] = {}
    for name, style in tp_plan.items():
        kind = UnitKind.KV_GROUP if is_of_heads(name) else UnitKind.MLP_CHANNEL
        if style.startswith("colwise"):
            producers.setdefault(kind, []).append(name)
        elif style.startswith("rowwise"):
            consumers[kind] = name
    blocks = {}
    for kind, consumer in consumers.items():
        module = consumer.rpartition(".")[0]
        if names := tuple(name for name in producers.get(kind, ()) if name.rpartition(".")[0] == module):
            blocks[kind] = BlockLinears(names, consumer)
    return blocks
