"""Export to GGUF: writes a model as one file, tensor by tensor, reads it back, and checks it in llama.cpp."""

from __future__ import annotations

import logging
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

from prunetune.errors import SelfCheckFailed
from prunetune.export.gguf import llamacpp, mixes
from prunetune.export.gguf.architectures import select_architecture
from prunetune.export.gguf.metadata import add_metadata, export_notes
from prunetune.export.gguf.tensors import GgufTensor, TensorStream, build_tensors
from prunetune.export.gguf.tokenizer import add_tokenizer
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.source import ExportSource

DTYPES = ("f16", "f32", "bf16", "q8_0", *mixes.MIXES)
EXACT_DTYPES = ("f32", "f16")  # in these llama.cpp must generate the tokens of transformers in float32

# gguf-py logs every key and tensor at INFO, and warns of float16, which is meant here.
logging.getLogger("gguf").setLevel(logging.ERROR)


def export_gguf(source: ExportSource, path: Path, options: ExportOptions) -> ExportResult:
    """Write one file for llama.cpp, and check it; layers may differ in width if it has an architecture for them.

    Raises `ModelError` or `MissingPackage` before anything is written, `SelfCheckFailed` if a check fails.
    """
    arch = select_architecture(source)
    dtype = options.dtype
    if dtype in mixes.MIXES:
        mixes.require_library(dtype)
    tensors, tokenizer_note = write_gguf(source, path, dtype)
    verify_tensors(source, path, tensors)
    readback = RuntimeCheck(f"gguf {version('gguf')}", f"{len(tensors)} tensors of {dtype} read back, equal to the bit")
    return ExportResult(
        path=path,
        format=f"GGUF, architecture {arch.name}",
        dtype=dtype,
        params=source.params,
        bytes=path.stat().st_size,
        checks=(readback, check_in_llamacpp(source, path, exact=dtype in EXACT_DTYPES)),
        notes=(*export_notes(source, arch), *fallback_notes(tensors, dtype), tokenizer_note),
    )


def write_gguf(source: ExportSource, path: Path, dtype: str) -> tuple[tuple[GgufTensor, ...], str]:
    """Write metadata, tokenizer and tensors in one pass; returns the tensors, and a note on the tokenizer's origin."""
    arch = select_architecture(source)
    tensors = build_tensors(source, arch, dtype)
    writer = gguf.GGUFWriter(path, arch.name)
    try:
        add_metadata(writer, source, arch, dtype)
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


def check_in_llamacpp(source: ExportSource, path: Path, *, exact: bool) -> RuntimeCheck:
    """Compare next tokens in llama.cpp and transformers; with `exact` raises `SelfCheckFailed` if they differ."""
    runtime = llamacpp.runtime_version()
    if not runtime:
        return RuntimeCheck("llama.cpp", "install it with pip install 'prunetune[llamacpp]'", ran=False)
    prompts = llamacpp.check_prompts(source)
    agreement = llamacpp.compare_tokens(path, source, prompts, llamacpp.reference_continuations(source, prompts))
    if exact and not agreement.all_equal:
        raise SelfCheckFailed(f"{path}: {runtime} differs from transformers: {agreement}; please report this")
    return RuntimeCheck(runtime, str(agreement))


def fallback_notes(tensors: tuple[GgufTensor, ...], dtype: str) -> tuple[str, ...]:
    """A note on tensors whose rows do not divide into the type's blocks; one on the types of a mix."""
    if dtype in mixes.MIXES:
        matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
        counts = Counter(tensor.type.name.lower() for tensor in matrices)
        other = sum(tensor.shape[-1] % 256 != 0 for tensor in matrices)
        advice = f"; rows of {other} do not divide by 256, and take more (budget.align 256 avoids it)" if other else ""
        return (f"types: {', '.join(f'{count} {name}' for name, count in counts.most_common())}{advice}",)
    fallbacks = sum(len(tensor.shape) > 1 and tensor.type.name.lower() != dtype for tensor in tensors)
    if not fallbacks:
        return ()
    return (
        f"{fallbacks} tensors stay f16: their rows do not divide into blocks of {dtype} (budget.align 32 avoids it)",
    )
