"""Write a model as one GGUF file, tensor by tensor, read it back, and ask llama.cpp."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

from prunetune.errors import SelfCheckFailed
from prunetune.export.gguf import kquants, llamacpp
from prunetune.export.gguf.architectures import select_architecture
from prunetune.export.gguf.metadata import add_metadata, export_notes
from prunetune.export.gguf.tensors import GgufTensor, TensorStream, build_tensors
from prunetune.export.gguf.tokenizer import add_tokenizer
from prunetune.export.result import ExportOptions, ExportResult, RuntimeCheck
from prunetune.export.source import ExportSource

DTYPES = ("f16", "f32", "bf16", "q8_0", *kquants.KQUANT_TYPES)
EXACT_DTYPES = ("f32", "f16")  # in which llama.cpp has to say what transformers says in float32

# It logs every key and tensor at INFO, and warns of what is meant.
logging.getLogger("gguf").setLevel(logging.ERROR)


def export_gguf(source: ExportSource, place: Path, options: ExportOptions) -> ExportResult:
    """One file for llama.cpp; of unequal layers where it has an architecture for them. Raises a `PrunetuneError`."""
    arch = select_architecture(source)
    mixes = options.dtype in kquants.KQUANT_TYPES
    dtype = kquants.unquantized_dtype(source.dtype) if mixes else options.dtype
    if mixes:
        kquants.require_llama_cpp()
    written = place.with_name(place.name + ".exact") if mixes else place
    try:
        made, tokenizer = write_gguf(source, written, dtype)
        verify_tensors(source, written, made)
        mixed = kquants.quantize(written, place, options.dtype) if mixes else ()
    finally:
        if mixes:
            written.unlink(missing_ok=True)
    read = RuntimeCheck(f"gguf {version('gguf')}", f"{len(made)} tensors of {dtype} read back, equal to the bit")
    return ExportResult(
        path=place,
        format=f"GGUF, architecture {arch.name}",
        dtype=options.dtype,
        params=source.params,
        bytes=place.stat().st_size,
        checks=(read, check_in_llamacpp(source, place, exact=options.dtype in EXACT_DTYPES)),
        notes=(*export_notes(source, arch), *fallback_notes(made, dtype), *mixed, tokenizer),
    )


def write_gguf(source: ExportSource, place: Path, dtype: str) -> tuple[tuple[GgufTensor, ...], str]:
    """Write the file once through: keys, tokenizer, tensors. Returns the tensors, and where the tokenizer is from."""
    arch = select_architecture(source)
    made = build_tensors(source, arch, dtype)
    writer = gguf.GGUFWriter(place, arch.name)
    try:
        add_metadata(writer, source, arch, dtype)
        tokenizer = add_tokenizer(writer, source)
        for tensor in made:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in made:
            writer.write_tensor_data(TensorStream(tensor, source))
    finally:
        writer.close()
    return made, tokenizer


def verify_tensors(source: ExportSource, place: Path, made: tuple[GgufTensor, ...]) -> None:
    """Every tensor of the file, to the bit; raises `SelfCheckFailed`."""
    stored = {tensor.name: (int(tensor.data_offset), int(tensor.n_bytes)) for tensor in gguf.GGUFReader(place).tensors}
    if set(stored) != {tensor.name for tensor in made}:
        raise SelfCheckFailed(f"{place} holds other tensors than were written")
    with place.open("rb") as file:
        for tensor in made:
            start, length = stored[tensor.name]
            file.seek(start)
            same = all(file.read(block.nbytes) == block.tobytes() for block in tensor.iter_blocks(source))
            if not same or file.tell() != start + length:
                raise SelfCheckFailed(f"{place}: {tensor.name} is not what was written; try again on another disk")


def check_in_llamacpp(source: ExportSource, place: Path, *, exact: bool) -> RuntimeCheck:
    """Next tokens in llama.cpp; raises `SelfCheckFailed` where they have to be those of transformers and are not."""
    runtime = llamacpp.runtime_version()
    if not runtime:
        return RuntimeCheck("llama.cpp", "install it with pip install 'prunetune[llamacpp]'", ran=False)
    prompts = llamacpp.check_prompts(source)
    found = llamacpp.compare_tokens(place, source, prompts, llamacpp.reference_continuations(source, prompts))
    if exact and not found.all_equal:
        raise SelfCheckFailed(f"{place}: {runtime} differs from transformers: {found}; please report this")
    return RuntimeCheck(runtime, str(found))


def fallback_notes(made: tuple[GgufTensor, ...], dtype: str) -> tuple[str, ...]:
    """Says so where rows did not divide into the type's blocks."""
    odd = [tensor for tensor in made if len(tensor.shape) > 1 and tensor.type.name.lower() != dtype]
    if not odd:
        return ()
    return (f"{len(odd)} tensors stay f16: their rows do not divide into blocks of {dtype} (budget.align 32 would do)",)
