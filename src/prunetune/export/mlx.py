"""Export for mlx-lm, on Apple's devices: a uniform folder as it is, a per-layer model as mlx-lm's OpenELM.

OpenELM's layers have widths of their own and are otherwise those of Llama without biases, or of Qwen 3 with norms of
queries and keys (mlx_lm/models/openelm.py). Its query, key and value are one tensor, as are gate and up projection.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from prunetune.errors import ModelError, SelfCheckFailed
from prunetune.export import convert
from prunetune.export.gguf import llamacpp
from prunetune.export.gguf.architectures import OPENELM, incompatibility, rope_options
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.source import ExportSource
from prunetune.pruning.families import head_counts
from prunetune.utils.files import write_text
from prunetune.utils.optional import is_installed

log = logging.getLogger(__name__)
FAMILIES = ("llama", "mistral", "qwen3")
ARCHITECTURE = replace(OPENELM, tied_embeddings=False, rope_types=frozenset({"default"}))
MLX_SCRIPT = """
import json, sys, mlx.core as mx, mlx_lm
folder, request_file, answer_file = sys.argv[1:]
model, _ = mlx_lm.load(folder)
model.set_dtype(mx.float32)
answer = [int(model(mx.array([ids]))[0, -1].argmax()) for ids in json.load(open(request_file))]
json.dump({"version": mlx_lm.__version__, "next": answer}, open(answer_file, "w"))
"""


def export_mlx(source: ExportSource, path: Path, options: ExportOptions) -> ExportResult:
    """Write a folder that mlx-lm opens, and compare its next tokens if mlx-lm is installed.

    Raises `ModelError` if OpenELM cannot hold a per-layer model, `SelfCheckFailed` if mlx-lm differs in float32.
    """
    if source.layout == "uniform":
        result = convert.export_uniform(source, path, options)
    else:
        result = _export_openelm(source, path, convert.DTYPES.get(options.dtype, source.dtype))
    check = RuntimeCheck("mlx-lm", "not installed here", ran=False)
    if is_installed("mlx_lm"):
        prompts = llamacpp.check_prompts(source)
        references = llamacpp.reference_continuations(source, prompts)
        beginnings = llamacpp.prefixes_of(prompts, references)
        log.info("generating them with mlx-lm")
        answer = llamacpp.run_script(MLX_SCRIPT, [str(path.absolute())], beginnings, "mlx-lm")
        agreement = llamacpp.count_agreement(answer["next"], references)
        if result.dtype == "float32" and agreement.equal + agreement.ties < agreement.steps:
            raise SelfCheckFailed(f"{path}: mlx-lm differs from transformers: {agreement}; please report this")
        check = RuntimeCheck(
            f"mlx-lm {answer['version']}", f"{agreement.equal} of {agreement.steps} greedy tokens equal"
        )
    return replace(result, checks=(*result.checks, check))


def _export_openelm(source: ExportSource, path: Path, dtype: torch.dtype) -> ExportResult:
    config, heads, layers = source.config, head_counts(source.config), source.layer_widths
    has_window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    problem = "" if config.model_type in FAMILIES else f"its layers are not those of {config.model_type}"
    problem = problem or ("it has no sliding windows" if has_window else incompatibility(ARCHITECTURE, source))
    if problem:
        raise ModelError(
            f"{source.folder}: mlx-lm's OpenELM, whose layers may differ in width, cannot hold this model ({problem}): "
            "run again with --layout uniform"
        )

    def stored(name: str) -> torch.Tensor:
        return source.tensor(f"model.{name}.weight").to(dtype)

    tensors = {
        "transformer.token_embeddings.weight": stored("embed_tokens"),
        "transformer.norm.weight": stored("norm"),
    }
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = source.tensor("lm_head.weight").to(dtype)
    has_norms = "model.layers.0.self_attn.q_norm.weight" in source.tensor_files
    for index in range(len(layers)):
        old, new = f"layers.{index}", f"transformer.layers.{index}"
        tensors |= {
            f"{new}.attn_norm.weight": stored(f"{old}.input_layernorm"),
            f"{new}.ffn_norm.weight": stored(f"{old}.post_attention_layernorm"),
            f"{new}.attn.qkv_proj.weight": torch.cat([stored(f"{old}.self_attn.{name}_proj") for name in "qkv"]),
            f"{new}.attn.out_proj.weight": stored(f"{old}.self_attn.o_proj"),
            f"{new}.ffn.proj_1.weight": torch.cat([stored(f"{old}.mlp.{name}_proj") for name in ("gate", "up")]),
            f"{new}.ffn.proj_2.weight": stored(f"{old}.mlp.down_proj"),
        }
        for name in ("q_norm", "k_norm") if has_norms else ():
            tensors[f"{new}.attn.{name}.weight"] = stored(f"{old}.self_attn.{name}")
    log.info("writing %.1f M parameters as OpenELM", source.params / 1e6)
    path.mkdir()
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors", {"format": "mlx"}
    )
    source.tokenizer.save_pretrained(path)
    values: dict[str, Any] = {
        "model_type": "openelm",
        "architectures": ["OpenELMForCausalLM"],
        "head_dim": heads.head_dim,
        "num_transformer_layers": len(layers),
        "model_dim": config.hidden_size,
        "vocab_size": config.vocab_size,
        "ffn_dim_divisor": 1,  # so that the multipliers give the widths as they are
        "num_query_heads": [layer.query_heads for layer in layers],
        "num_kv_heads": [layer.kv_heads for layer in layers],
        "ffn_multipliers": [layer.mlp_channels / config.hidden_size for layer in layers],
        "normalize_qk_projections": has_norms,
        "share_input_output_layers": bool(config.tie_word_embeddings),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_freq_constant": rope_options(config)["full_attention"]["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    write_text(path / "config.json", json.dumps(values, indent=2) + "\n")
    size = (path / "model.safetensors").stat().st_size
    return ExportResult(path, "OpenELM for mlx-lm", str(dtype).removeprefix("torch."), source.params, size, ())
