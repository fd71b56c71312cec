"""The metadata keys of a GGUF file: sizes, positions and scales; and notes on what the file cannot express."""

from __future__ import annotations

from typing import Any

import gguf

from prunetune.export.gguf.architectures import GgufArchitecture, rope_options
from prunetune.export.gguf.mixes import MIXES
from prunetune.export.source import ExportSource
from prunetune.pruning.families import head_counts

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    **{mix: gguf.LlamaFileType[f"MOSTLY_{mix.upper()}"] for mix in MIXES},
}


def add_metadata(writer: gguf.GGUFWriter, source: ExportSource, arch: GgufArchitecture, dtype: str) -> None:
    """Write all keys but the tokenizer's."""
    config, heads = source.config, head_counts(source.config)
    writer.add_name(source.name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_one_or_per_layer(arch, [layer.mlp_channels for layer in source.layer_widths]))
    writer.add_head_count(_one_or_per_layer(arch, [layer.query_heads for layer in source.layer_widths]))
    writer.add_head_count_kv(_one_or_per_layer(arch, [layer.kv_heads for layer in source.layer_widths]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(heads.head_dim)
    writer.add_value_length(heads.head_dim)
    writer.add_rope_dimension_count(heads.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, name in arch.float_keys.items():
        value = getattr(config, name, None)
        if value is not None:
            writer.add_float32(f"{arch.name}.{key}", float(value))
    _add_rope(writer, rope_options(config))
    if arch.sliding_window and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _one_or_per_layer(arch: GgufArchitecture, widths: list[int]) -> int | list[int]:
    return widths if arch.per_layer_widths else widths[0]


def _add_rope(writer: gguf.GGUFWriter, options: Any) -> None:
    rope = options["full_attention"]
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "sliding_attention" in options:
        writer.add_rope_freq_base_swa(float(options["sliding_attention"]["rope_theta"]))
    rope_type = rope.get("rope_type", "default")
    if rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_type))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))


def export_notes(source: ExportSource, arch: GgufArchitecture) -> tuple[str, ...]:
    """Notes for the export's result on differences between the file and the checkpoint."""
    config = source.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    notes = [f"written as {arch.name}"] if arch.name != config.model_type else []
    if window and not arch.sliding_window and window < config.max_position_embeddings:
        notes.append(f"llama.cpp's {arch.name} has no window of {window} tokens: longer texts are read differently")
    return tuple(notes)
