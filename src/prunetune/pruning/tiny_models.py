"""A tiny random model of a configuration: all its switches and kinds of layers, and few units of every kind."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch

from prunetune.errors import UnknownArchitecture

MOST_PARAMS = 8_000_000  # of a small model, whatever a configuration asks for
LAYERS = 4  # at least; more where layers are of more than two kinds
HEAD_DIM = 16
# Sizes by the names that configurations give them; the first pattern that fits counts.
SIZES: Mapping[str, int] = {
    r"hidden_size|d_model|n_embd|word_embed_proj_dim|embedding_size|lru_width": 64,
    r"vocab_size|vocab_size_per_layer_input": 128,
    r"moe_intermediate_size|expert_ffn_hidden_size|moe_ffn_hidden_size": 32,
    r"shared_\w*intermediate_size": 48,
    r"intermediate_size\w*|\w*ffn_dim|n_inner|ffn_hidden_size|block_ff_dim": 96,
    r"qk_head_dim": HEAD_DIM + 8,
    r"qk_rope_head_dim|hidden_size_per_layer_input|index_topk|sliding_window\w*|mamba_d_state|\w*(state|chunk)_size": 8,
    r"\w*lora_rank|\w*time_step_rank|(\w*_)?head_dim": HEAD_DIM,
    r"(moe_)?num_experts|num_local_experts|n_routed_experts|(encoder|decoder)_attention_heads|n_heads?|rotary_dim": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts": 2,
    r"linear_num_(key_|value_)?heads|index_n_heads|attn_layer_period": 2,
    r"n_group|topk_group|num_expert_group|(mamba_)?n_groups": 1,
    r"num_kv_shared_layers|first_k_dense_replace|attn_layer_offset": 1,
}
NOT_STRUCTURE = ("transformers_version", "architectures", "_name_or_path", "dtype", "auto_map")
LAYER_CHOICES = ("moe_layers", "attn_layer_indices", "mlp_only_layers", "full_attn_idxs")  # lists of layers' indices
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def tiny_config(config: Any) -> Any:
    """The configuration with small sizes: its layers of every kind, with 4 query heads or fewer, and 4 experts.

    Raises `UnknownArchitecture` where these sizes alone do not make its model small.
    """
    from transformers import AutoModelForCausalLM

    values = {key: value for key, value in config.to_dict().items() if key not in NOT_STRUCTURE}
    total = next((values[key] for key in LAYER_COUNTS if isinstance(values.get(key), int)), LAYERS)
    chosen = {key: value for key in LAYER_CHOICES if isinstance(value := values.get(key), list)}
    by_layer = {key: value for key, value in values.items() if isinstance(value, list) and len(value) == total > 1}
    by_layer = {key: value for key, value in by_layer.items() if key not in chosen}
    kinds = [
        (*(str(value[index]) for value in by_layer.values()), *(index in value for value in chosen.values()))
        for index in range(total)
    ]
    first = [index for index, kind in enumerate(kinds) if kinds[:index].count(kind) < 2]
    others = [index for index in range(total) if index not in first]
    kept = sorted([*first, *others[: max(0, LAYERS - len(first))]])
    small = dict(values)
    for key, value in values.items():
        size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, key)), None)
        if key in chosen:
            small[key] = [place for place, index in enumerate(kept) if index in value]
        elif key in by_layer:
            small[key] = [value[index] if size is None or not value[index] else size for index in kept]
        elif key in LAYER_COUNTS and isinstance(value, int):
            small[key] = len(kept)
        elif size is not None and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small[key] = min(size, value)
        elif "drop" in key and isinstance(value, float):
            small[key] = 0.0
        elif key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            small[key] = ("pad", "bos", "eos").index(key[:3])
    if isinstance(own := values.get("per_layer_config"), dict):
        places = {index: place for place, index in enumerate(kept)}
        small["per_layer_config"] = {
            places[int(index)]: {
                key: 1 if key == "num_key_value_heads" else 2 * HEAD_DIM if key == "head_dim" else value
                for key, value in own[index].items()
            }
            for index in own
            if int(index) in places
        }
    if values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    if values.get("mamba_d_head"):
        inner = 64 * values["mamba_expand"]
        small |= {"mamba_d_head": HEAD_DIM, "mamba_n_heads": inner // HEAD_DIM}
        small |= {"mamba_d_ssm": inner} if "mamba_d_ssm" in values else {}
    queries = values.get("num_attention_heads") or 4
    groups = values.get("num_key_value_heads") or queries
    if isinstance(queries, int) and isinstance(groups, int):
        small_groups = 1 if groups == 1 < queries else 4 if groups == queries else 2
        counts = {"num_attention_heads": 4, "num_key_value_heads": small_groups}
        small |= {key: count for key, count in counts.items() if values.get(key)}
    tiny = type(config).from_dict(small)
    with torch.device("meta"):
        params = sum(
            weight.numel() for weight in AutoModelForCausalLM.from_config(tiny, trust_remote_code=False).parameters()
        )
    if params > MOST_PARAMS:
        raise UnknownArchitecture(f"a small {config.model_type!r} still has {params:,} parameters")
    return tiny


def tiny_model(config: Any) -> Any:
    """A random model of a configuration, with random biases and norms, so that no term is zero."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # which a model changes that loses layers
    # The CPU also where transformers is building another model on the meta device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = (
            AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            .eval()
            .requires_grad_(False)
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(std=0.5)
            elif parameter.dim() >= 2:
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.0)
    return model
