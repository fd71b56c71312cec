"""What llama.cpp can hold: one entry for each of its architectures, and which of them a family of transformers takes.

Read off its loaders (src/models/*.cpp, release of 2026-10-01) and tried in it. Names of tensors are gguf-py's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.source import ExportSource
from prunetune.pruning.families import FAMILIES, head_counts

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ALL_LINEARS = QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}
# Options of positions that llama.cpp does not read, with what it computes for them; None: from the factor.
UNREAD_ROPE_OPTIONS: Mapping[str, Any] = {
    "attention_factor": None, "mscale": None, "mscale_all_dim": None, "beta_fast": 32, "beta_slow": 1, "truncate": True,
}  # fmt: skip
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """One of llama.cpp's architectures."""

    name: str  # general.architecture
    interleaved_rope: bool = (
        False  # rotary pairs lie side by side, not in two halves: rows of query and key change places
    )
    activation: str = "silu"
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn"})  # scalings of the positions it knows
    biased: frozenset[str] = frozenset()  # linears that may have a bias
    heads_fill_hidden: bool = False  # takes no other heads than those that make up the hidden size
    tied_embeddings: bool = False  # its output head is the embedding
    fused_qkv: bool = False  # query, key and value lie in one tensor
    sliding_window: bool = False  # layers of sliding attention
    per_layer_widths: bool = False  # widths may differ by layer
    allows_no_attention: bool = False  # a layer may skip attention
    norm_offset: float = 0.0  # of norms: transformers keeps Gemma's less one
    float_keys: Mapping[str, str] = field(default_factory=lambda: EMPTY)  # key -> the configuration's name
    required_values: Mapping[str, Callable[[Any], Any]] = field(
        default_factory=lambda: EMPTY
    )  # values taken for granted


def _head_dim(config: Any) -> Any:
    return head_counts(config).head_dim


LLAMA = GgufArchitecture(
    name="llama",
    interleaved_rope=True,
    biased=ALL_LINEARS,
    rope_types=frozenset({"default", "linear", "yarn", "llama3"}),
)
DECI = GgufArchitecture(
    name="deci",
    interleaved_rope=True,
    biased=ALL_LINEARS,
    rope_types=LLAMA.rope_types,
    per_layer_widths=True,
    allows_no_attention=True,
)
OPENELM = GgufArchitecture(name="openelm", fused_qkv=True, tied_embeddings=True, per_layer_widths=True)
QWEN2 = GgufArchitecture(name="qwen2", biased=QKV, heads_fill_hidden=True)
QWEN3 = GgufArchitecture(name="qwen3", biased=QKV)
SEED_OSS = GgufArchitecture(name="seed_oss", biased=QKV)
PHI3 = GgufArchitecture(name="phi3", heads_fill_hidden=True, rope_types=frozenset({"default"}))
SMOLLM3 = GgufArchitecture(
    name="smollm3",
    interleaved_rope=True,
    required_values={"no_rope_layers": lambda config: [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]},
)
GRANITE = GgufArchitecture(
    name="granite",
    interleaved_rope=True,
    biased=ALL_LINEARS,
    rope_types=LLAMA.rope_types,
    float_keys={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
)
GEMMA = GgufArchitecture(name="gemma", activation="gelu_pytorch_tanh", tied_embeddings=True, norm_offset=1.0)
GEMMA2 = GgufArchitecture(
    name="gemma2",
    activation="gelu_pytorch_tanh",
    tied_embeddings=True,
    norm_offset=1.0,
    sliding_window=True,
    float_keys={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    required_values={"query_pre_attn_scalar": _head_dim},
)
GEMMA3 = GgufArchitecture(
    name="gemma3",
    activation="gelu_pytorch_tanh",
    norm_offset=1.0,
    sliding_window=True,
    required_values={"query_pre_attn_scalar": _head_dim, "attn_logit_softcapping": lambda _: None},
)

# By model_type; the first that fits is taken.
UNIFORM_ARCHITECTURES: Mapping[str, tuple[GgufArchitecture, ...]] = {
    "llama": (LLAMA,),
    "mistral": (LLAMA,),
    "qwen2": (QWEN2, SEED_OSS),  # the same arithmetic; seed_oss has a head size of its own
    "qwen3": (QWEN3,),
    "seed_oss": (SEED_OSS,),
    "gemma": (GEMMA,),
    "gemma2": (GEMMA2,),
    "gemma3_text": (GEMMA3,),
    "phi3": (PHI3,),
    "smollm3": (SMOLLM3,),
    "granite": (GRANITE,),
}
PER_LAYER_ARCHITECTURES: Mapping[str, tuple[GgufArchitecture, ...]] = {
    "llama": (DECI,),
    "mistral": (DECI,),
    "qwen2": (DECI,),
    "seed_oss": (DECI,),
    "qwen3": (OPENELM,),
}


def select_architecture(source: ExportSource) -> GgufArchitecture:
    """The architecture that holds this model; raises `ModelError` with the reason where there is none."""
    family = source.config.model_type
    candidates = (PER_LAYER_ARCHITECTURES if source.layout == "per-layer" else UNIFORM_ARCHITECTURES).get(family, ())
    reasons = []
    for candidate in candidates:
        reason = incompatibility(candidate, source)
        if not reason:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    found = "; ".join(reasons) or f"it has no architecture for {family} in this layout"
    ways = (
        ["run again with --layout uniform"] if source.layout == "per-layer" and family in UNIFORM_ARCHITECTURES else []
    )
    mixed = family in FAMILIES and FAMILIES[family].mixture
    ways += ["use the folder itself" if mixed else "export onnx"]
    raise ModelError(f"{source.folder}: llama.cpp cannot hold this model ({found}): {', or '.join(ways)}")


def incompatibility(arch: GgufArchitecture, source: ExportSource) -> str:
    """Why this architecture cannot hold the model; "" where it can."""
    config, heads = source.config, head_counts(source.config)
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    ropes = {str(rope.get("rope_type", "default")) for rope in rope_options(config).values()}
    biased = {name.split(".")[-2] for name in source.tensor_files if name.endswith(".bias")} - arch.biased
    odd = [name for name, value in arch.required_values.items() if getattr(config, name, None) != value(config)]
    tuned = {
        key
        for rope in rope_options(config).values()
        for key in rope
        if rope[key] != UNREAD_ROPE_OPTIONS.get(key, rope[key])
    }
    narrow = [i for i, layer in enumerate(source.layer_widths) if not layer.mlp_channels]
    bare = [i for i, layer in enumerate(source.layer_widths) if not layer.query_heads]
    rules = (
        (act != arch.activation, f"its activation is {arch.activation}, the model's {act}"),
        (bool(ropes - arch.rope_types), f"it does not scale positions by {', '.join(sorted(ropes))}"),
        (bool(tuned), f"it takes {', '.join(sorted(tuned))} of the positions for granted"),
        (getattr(config, "partial_rotary_factor", None) not in (None, 1.0), "it turns whole heads"),
        (bool(biased), f"it has no bias at {', '.join(sorted(biased))}"),
        (bool(odd), f"it takes another {', '.join(odd)} for granted"),
        (
            arch.tied_embeddings and not config.tie_word_embeddings,
            "its output head is the embedding, the model's is not",
        ),
        (
            arch.heads_fill_hidden and heads.query_heads * heads.head_dim != config.hidden_size,
            f"it wants heads of {config.hidden_size} rows in all, these have {heads.query_heads * heads.head_dim}",
        ),
        (bool(narrow), f"layer {', '.join(map(str, narrow))} has no MLP"),
        (bool(bare) and not arch.allows_no_attention, f"layer {', '.join(map(str, bare))} has no attention"),
    )
    return next((why for wrong, why in rules if wrong), "")


def rope_options(config: Any) -> Mapping[str, Mapping[str, Any]]:
    """The rotary options by type of attention; "full_attention" is always there."""
    found = dict(config.rope_parameters or {})
    return found if "full_attention" in found else {"full_attention": found}
