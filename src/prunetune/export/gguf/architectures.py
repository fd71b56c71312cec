"""What llama.cpp can hold: one entry for each of its architectures, and which of them a family of transformers takes.

Read off its loaders (src/models/*.cpp, release of 2026-10-01) and tried in it. Names of tensors are gguf-py's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from prunetune.errors import ModelError
from prunetune.export.source import Source
from prunetune.pruning.families import FAMILIES, heads_of

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
ALL = QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"}
# Options of positions that llama.cpp does not read, with what it computes for them; None: from the factor.
POSITIONS: Mapping[str, Any] = {
    "attention_factor": None, "mscale": None, "mscale_all_dim": None, "beta_fast": 32, "beta_slow": 1, "truncate": True,
}  # fmt: skip
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's architectures."""

    name: str  # general.architecture
    paired: bool = False  # rotary pairs lie side by side, not in two halves: rows of query and key change places
    act: str = "silu"
    ropes: frozenset[str] = frozenset({"default", "linear", "yarn"})  # scalings of the positions it knows
    biased: frozenset[str] = frozenset()  # linears that may have a bias
    square: bool = False  # takes no other heads than those that make up the hidden size
    tied: bool = False  # its output head is the embedding
    fused: bool = False  # query, key and value lie in one tensor
    window: bool = False  # layers of sliding attention
    layered: bool = False  # widths may differ by layer
    headless: bool = False  # a layer may skip attention
    offset: float = 0.0  # of norms: transformers keeps Gemma's less one
    floats: Mapping[str, str] = field(default_factory=lambda: NOTHING)  # key -> the configuration's name
    same: Mapping[str, Callable[[Any], Any]] = field(default_factory=lambda: NOTHING)  # values taken for granted


def _scale(config: Any) -> Any:
    return heads_of(config).size


LLAMA = Architecture(name="llama", paired=True, biased=ALL, ropes=frozenset({"default", "linear", "yarn", "llama3"}))
DECI = Architecture(name="deci", paired=True, biased=ALL, ropes=LLAMA.ropes, layered=True, headless=True)
OPENELM = Architecture(name="openelm", fused=True, tied=True, layered=True)
QWEN2 = Architecture(name="qwen2", biased=QKV, square=True)
QWEN3 = Architecture(name="qwen3", biased=QKV)
SEED_OSS = Architecture(name="seed_oss", biased=QKV)
PHI3 = Architecture(name="phi3", square=True, ropes=frozenset({"default"}))
SMOLLM3 = Architecture(
    name="smollm3",
    paired=True,
    same={"no_rope_layers": lambda config: [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]},
)
GRANITE = Architecture(
    name="granite",
    paired=True,
    biased=ALL,
    ropes=LLAMA.ropes,
    floats={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
)
GEMMA = Architecture(name="gemma", act="gelu_pytorch_tanh", tied=True, offset=1.0)
GEMMA2 = Architecture(
    name="gemma2",
    act="gelu_pytorch_tanh",
    tied=True,
    offset=1.0,
    window=True,
    floats={
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    same={"query_pre_attn_scalar": _scale},
)
GEMMA3 = Architecture(
    name="gemma3",
    act="gelu_pytorch_tanh",
    offset=1.0,
    window=True,
    same={"query_pre_attn_scalar": _scale, "attn_logit_softcapping": lambda _: None},
)

# By model_type; the first that fits is taken.
UNIFORM: Mapping[str, tuple[Architecture, ...]] = {
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
PER_LAYER: Mapping[str, tuple[Architecture, ...]] = {
    "llama": (DECI,),
    "mistral": (DECI,),
    "qwen2": (DECI,),
    "seed_oss": (DECI,),
    "qwen3": (OPENELM,),
}


def architecture_of(source: Source) -> Architecture:
    """The architecture that holds this model; raises `ModelError` with the reason where there is none."""
    family = source.config.model_type
    candidates = (PER_LAYER if source.layout == "per-layer" else UNIFORM).get(family, ())
    reasons = []
    for candidate in candidates:
        reason = refusal(candidate, source)
        if not reason:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
    found = "; ".join(reasons) or f"it has no architecture for {family} in this layout"
    ways = ["run again with --layout uniform"] if source.layout == "per-layer" and family in UNIFORM else []
    mixed = family in FAMILIES and FAMILIES[family].mixture
    ways += ["use the folder itself" if mixed else "export onnx"]
    raise ModelError(f"{source.folder}: llama.cpp cannot hold this model ({found}): {', or '.join(ways)}")


def refusal(arch: Architecture, source: Source) -> str:
    """Why this architecture cannot hold the model; "" where it can."""
    config, heads = source.config, heads_of(source.config)
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    ropes = {str(rope.get("rope_type", "default")) for rope in ropes_of(config).values()}
    biased = {name.split(".")[-2] for name in source.places if name.endswith(".bias")} - arch.biased
    odd = [name for name, value in arch.same.items() if getattr(config, name, None) != value(config)]
    tuned = {key for rope in ropes_of(config).values() for key in rope if rope[key] != POSITIONS.get(key, rope[key])}
    narrow = [i for i, layer in enumerate(source.widths) if not layer.channels]
    bare = [i for i, layer in enumerate(source.widths) if not layer.queries]
    rules = (
        (act != arch.act, f"its activation is {arch.act}, the model's {act}"),
        (bool(ropes - arch.ropes), f"it does not scale positions by {', '.join(sorted(ropes))}"),
        (bool(tuned), f"it takes {', '.join(sorted(tuned))} of the positions for granted"),
        (getattr(config, "partial_rotary_factor", None) not in (None, 1.0), "it turns whole heads"),
        (bool(biased), f"it has no bias at {', '.join(sorted(biased))}"),
        (bool(odd), f"it takes another {', '.join(odd)} for granted"),
        (arch.tied and not config.tie_word_embeddings, "its output head is the embedding, the model's is not"),
        (
            arch.square and heads.queries * heads.size != config.hidden_size,
            f"it wants heads of {config.hidden_size} rows in all, these have {heads.queries * heads.size}",
        ),
        (bool(narrow), f"layer {', '.join(map(str, narrow))} has no MLP"),
        (bool(bare) and not arch.headless, f"layer {', '.join(map(str, bare))} has no attention"),
    )
    return next((why for wrong, why in rules if wrong), "")


def ropes_of(config: Any) -> Mapping[str, Mapping[str, Any]]:
    """The rotary options by type of attention; "full_attention" is always there."""
    found = dict(config.rope_parameters or {})
    return found if "full_attention" in found else {"full_attention": found}
