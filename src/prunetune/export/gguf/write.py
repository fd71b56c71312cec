"""Export to GGUF: writes a model as one file, tensor by tensor, reads it back, and checks it in llama.cpp."""

import logging
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

from prunetune.errors import SelfCheckFailed
from prunetune.export.gguf import llamacpp
from prunetune.export.gguf.architectures import GgufArchitecture, rope_options, select_architecture
from prunetune.export.gguf.importance import NO_IMPORTANCE, ImportanceMatrix, measure_importance
from prunetune.export.gguf.tensors import MIXES, GgufTensor, TensorStream, build_tensors, require_library
from prunetune.export.gguf.tokenizer import add_tokenizer
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.source import ExportSource
from prunetune.pruning.families import head_counts
from prunetune.utils.optional import install_command

log = logging.getLogger(__name__)
DTYPES = ("f16", "f32", "bf16", "q8_0", *MIXES)
EXACT_DTYPES = ("f32", "f16")  # in these llama.cpp must generate the tokens of transformers in float32

# gguf-py logs every key and tensor at INFO, and warns of float16, which is meant here.
logging.getLogger("gguf").setLevel(logging.ERROR)


def export_gguf(source: ExportSource, path: Path, options: ExportOptions) -> ExportResult:
    """Write one file for llama.cpp, and check it; layers may differ in width if it has an architecture for them.

    Raises `ModelError` or `MissingPackage` before anything is written, `SelfCheckFailed` if a check fails.
    """
    arch, config, dtype = select_architecture(source), source.config, options.dtype
    if dtype in MIXES:
        require_library(dtype)
    importance = measure_importance(source, options.imatrix_tokens) if dtype in MIXES else NO_IMPORTANCE
    log.info("writing %.1f M parameters as %s, %s", source.params / 1e6, arch.name, dtype)
    tensors, tokenizer_note = write_gguf(source, path, dtype, importance)
    log.info("reading %.1f MB back", path.stat().st_size / 1e6)
    verify_tensors(source, path, tensors)
    readback = RuntimeCheck(f"gguf {version('gguf')}", f"{len(tensors)} tensors of {dtype} read back, equal to the bit")
    # Next tokens in llama.cpp and transformers.
    in_llamacpp = RuntimeCheck("llama.cpp", f"not installed; run: {install_command('llamacpp')}", ran=False)
    if runtime := llamacpp.runtime_version():
        prompts = llamacpp.check_prompts(source)
        agreement = llamacpp.compare_tokens(path, source, prompts, llamacpp.reference_continuations(source, prompts))
        if dtype in EXACT_DTYPES and not agreement.all_equal:
            raise SelfCheckFailed(f"{path}: {runtime} differs from transformers: {agreement}; please report this")
        in_llamacpp = RuntimeCheck(runtime, str(agreement))
    # What the file cannot express, and types of tensors whose rows do not divide into blocks.
    notes = [f"written as {arch.name}"] if arch.name != config.model_type else []
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and not arch.sliding_window and window < config.max_position_embeddings:
        notes.append(f"llama.cpp's {arch.name} has no window of {window} tokens: longer texts are read differently")
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    counts = Counter(tensor.type.name.lower() for tensor in matrices)
    if dtype in MIXES:
        other = sum(tensor.shape[-1] % 256 != 0 for tensor in matrices)
        advice = f"; rows of {other} do not divide by 256, and take more (budget.align 256 avoids it)" if other else ""
        notes.append(f"types: {', '.join(f'{count} {name}' for name, count in counts.most_common())}{advice}")
        notes.append(importance.note)
    elif fallbacks := len(matrices) - counts[dtype]:
        advice = f"their rows do not divide into blocks of {dtype} (budget.align 32 avoids it)"
        notes.append(f"{fallbacks} tensors stay f16: {advice}")
    return ExportResult(
        path=path,
        format=f"GGUF, architecture {arch.name}",
        dtype=dtype,
        params=source.params,
        bytes=path.stat().st_size,
        checks=(readback, in_llamacpp),
        notes=(*notes, tokenizer_note),
    )


def write_gguf(
    source: ExportSource, path: Path, dtype: str, importance: ImportanceMatrix = NO_IMPORTANCE
) -> tuple[tuple[GgufTensor, ...], str]:
    """Write metadata, tokenizer and tensors in one pass; returns the tensors, and a note on the tokenizer's origin."""
    arch = select_architecture(source)
    tensors = build_tensors(source, arch, dtype, importance)
    writer = gguf.GGUFWriter(path, arch.name)
    try:
        add_metadata(writer, source, arch, dtype)
        if importance.columns:  # the keys that llama.cpp's own tool writes
            writer.add_string("quantize.imatrix.dataset", importance.note)
            writer.add_uint32("quantize.imatrix.entries_count", len(importance.columns))
            writer.add_uint32("quantize.imatrix.chunks_count", importance.rows)
        tokenizer_note = add_tokenizer(writer, source)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(TensorStream(tensor, source))
    finally:
        writer.close()
    return tensors, tokenizer_note


def verify_tensors(source: ExportSource, path: Path, tensors: tuple[GgufTensor, ...]) -> None:
    """Read the file back; raises `SelfCheckFailed` if a tensor differs from the stored weights by a bit."""
    stored = {tensor.name: (int(tensor.data_offset), int(tensor.n_bytes)) for tensor in gguf.GGUFReader(path).tensors}
    if set(stored) != {tensor.name for tensor in tensors}:
        raise SelfCheckFailed(f"{path} holds other tensors than were written")
    with path.open("rb") as file:
        for tensor in tensors:
            start, length = stored[tensor.name]
            file.seek(start)
            same = all(file.read(block.nbytes) == block.tobytes() for block in tensor.iter_blocks(source))
            if not same or file.tell() != start + length:
                raise SelfCheckFailed(f"{path}: {tensor.name} is not what was written; try again on another disk")


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
    ropes = rope_options(config)
    rope = ropes["full_attention"]
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(float(ropes["sliding_attention"]["rope_theta"]))
    rope_type = rope.get("rope_type", "default")
    if rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_type))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    if arch.sliding_window and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _one_or_per_layer(arch: GgufArchitecture, widths: list[int]) -> int | list[int]:
    return widths if arch.per_layer_widths else widths[0]
