"""llama.cpp's architectures: what each supports, and which one a family of transformers is written as.

Read from its loaders (src/models/*.cpp, release of 2026-10-01) and tested in it. Names of tensors are gguf-py's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.source import ExportSource
from prunetune.pruning.families import FAMILIES, head_counts

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ALL_LINEARS = QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}
# Rotary options that llama.cpp does not read, with the value that it assumes; None: computed from the factor.
UNREAD_ROPE_OPTIONS: Mapping[str, Any] = {
    "attention_factor": None, "mscale": None, "mscale_all_dim": None, "beta_fast": 32, "beta_slow": 1, "truncate": True,
}  # fmt: skip
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """What one of llama.cpp's architectures supports."""

    name: str  # general.architecture
    interleaved_rope: bool = False  # rotary pairs are adjacent rows, not rows of two halves: query and key are permuted
    activation: str = "silu"
    rope_types: frozenset[str] = frozenset({"default", "linear", "yarn"})  # scalings of positions
    biased: frozenset[str] = frozenset()  # linears that may have a bias
    heads_fill_hidden: bool = False  # heads * head size must be the hidden size
    tied_embeddings: bool = False  # the output head must be the embedding
    fused_qkv: bool = False  # query, key and value are one tensor
    sliding_window: bool = False  # layers may have sliding attention
    per_layer_widths: bool = False  # widths may differ by layer
    allows_no_attention: bool = False  # a layer may skip attention
    norm_offset: float = 0.0  # added to weights of norms: transformers stores Gemma's less one
    float_keys: Mapping[str, str] = field(default_factory=lambda: EMPTY)  # GGUF key -> option of the configuration
    required_values: Mapping[str, Callable[[Any], Any]] = field(
        default_factory=lambda: EMPTY
    )  # option -> assumed value


def _head_dim(config: Any) -> Any:
    return head_counts(config).head_dim


LLAMA = GgufArchitecture(
    name="llama",
    interleaved_rope=True,
    biased=ALL_LINEARS,
    rope_types=frozenset({"default", "linear", "yarn", "llama3"}),
)
DECI = replace(LLAMA, name="deci", per_layer_widths=True, allows_no_attention=True)
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
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    sliding_window=True,
    float_keys={name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
    required_values={"query_pre_attn_scalar": _head_dim},
)
GEMMA3 = replace(
    GEMMA,
    name="gemma3",
    tied_embeddings=False,
    sliding_window=True,
    required_values={"query_pre_attn_scalar": _head_dim, "attn_logit_softcapping": lambda _: None},
)

# By model_type; the first that supports the model is chosen.
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
    """The architecture to write this model as; raises `ModelError` with the reasons if none supports it."""
    family, per_layer = source.config.model_type, source.layout == "per-layer"
    reasons = []
    for arch in (PER_LAYER_ARCHITECTURES if per_layer else UNIFORM_ARCHITECTURES).get(family, ()):
        reason = incompatibility(arch, source)
        if not reason:
            return arch
        reasons.append(f"{arch.name}: {reason}")
    problem = "; ".join(reasons) or f"it has no architecture for {family} in this layout"
    uniform = UNIFORM_ARCHITECTURES.get(family, ()) if per_layer else ()
    would_help = any(not incompatibility(arch, source, any_width=True) for arch in uniform)
    remedies = ["run again with --layout uniform"] if would_help else []
    is_mixture = family in FAMILIES and FAMILIES[family].mixture
    remedies.append("use the folder itself" if is_mixture else "export onnx")
    raise ModelError(f"{source.folder}: llama.cpp cannot hold this model ({problem}): {', or '.join(remedies)}")


def incompatibility(arch: GgufArchitecture, source: ExportSource, *, any_width: bool = False) -> str:
    """Why this architecture cannot hold the model; "" if it can. `any_width`: whatever the widths of its layers are."""
    config, heads = source.config, head_counts(source.config)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    ropes = rope_options(config).values()
    rope_types = {str(rope.get("rope_type", "default")) for rope in ropes}
    unread = {key for rope in ropes for key, value in rope.items() if value != UNREAD_ROPE_OPTIONS.get(key, value)}
    biased = {name.split(".")[-2] for name in source.tensor_files if name.endswith(".bias")} - arch.biased
    other_values = [key for key, value in arch.required_values.items() if getattr(config, key, None) != value(config)]
    rows = heads.query_heads * heads.head_dim
    without_mlp = [str(i) for i, layer in enumerate(source.layer_widths) if not layer.mlp_channels]
    without_attention = [str(i) for i, layer in enumerate(source.layer_widths) if not layer.query_heads]
    rules = (
        (activation != arch.activation, f"its activation is {arch.activation}, the model's {activation}"),
        (rope_types - arch.rope_types, f"it does not scale positions by {', '.join(sorted(rope_types))}"),
        (unread, f"it does not read the rotary option {', '.join(sorted(unread))}, and assumes another value"),
        (getattr(config, "partial_rotary_factor", None) not in (None, 1.0), "it rotates whole heads"),
        (biased, f"it has no bias at {', '.join(sorted(biased))}"),
        (other_values, f"it assumes another value of {', '.join(other_values)}"),
        (
            arch.tied_embeddings and not config.tie_word_embeddings,
            "its output head is the embedding, the model's is not",
        ),
        (
            arch.heads_fill_hidden and rows != config.hidden_size and not any_width,
            f"it needs heads of {config.hidden_size} rows in all, these have {rows}",
        ),
        (without_mlp and not any_width, f"layer {', '.join(without_mlp)} has no MLP"),
        (
            without_attention and not (arch.allows_no_attention or any_width),
            f"layer {', '.join(without_attention)} has no attention",
        ),
    )
    return next((reason for is_violated, reason in rules if is_violated), "")


def rope_options(config: Any) -> Mapping[str, Mapping[str, Any]]:
    """Type of attention -> its rotary options; always has "full_attention"."""
    options = dict(config.rope_parameters or {})
    return options if "full_attention" in options else {"full_attention": options}
