"""A model's tensors in llama.cpp's names, row order and types; read and converted block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedWriter
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.export.gguf.architectures import GgufArchitecture, rope_options
from prunetune.export.gguf.mixes import K_TYPES, MIXES, mixed_types, quantize_block
from prunetune.export.source import ExportSource
from prunetune.pruning.families import head_counts

GGML_TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
MAX_BLOCK_VALUES = 2**22  # converted at a time: 16 MiB in float32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, and how it is made from stored ones."""

    name: str  # "blk.0.attn_q.weight"
    stored_names: tuple[str, ...]  # stored tensors, whose rows are concatenated
    shape: tuple[int, ...]
    type: Type
    interleaved_heads: int = 0  # number of heads whose rows are interleaved; 0: rows keep their order
    offset: float = 0.0  # added to every value
    computed: Tensor | None = None  # not stored, but computed from the configuration

    @property
    def nbytes(self) -> int:
        """The tensor's size in the file."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(block_values) * int(block_bytes)

    def iter_blocks(self, source: ExportSource) -> Iterator[NDArray[Any]]:
        """The tensor's bytes in the file, some rows at a time."""
        max_rows = max(1, MAX_BLOCK_VALUES // self.shape[-1])
        for stored in self.stored_names:
            blocks = (
                [interleave_rope_rows(source.tensor(stored), self.interleaved_heads)]
                if self.interleaved_heads
                else source.iter_rows(stored, max_rows)
            )
            for rows in blocks:
                yield quantize_rows(rows.float() + self.offset, self.type, self.name)
        if self.computed is not None:
            yield quantize_rows(self.computed, self.type, self.name)


@dataclass(frozen=True)
class TensorStream:
    """Stands in for the numpy array that gguf-py writes, which needs its size and `tofile`."""

    tensor: GgufTensor
    source: ExportSource

    @property
    def nbytes(self) -> int:
        """The tensor's size in the file."""
        return self.tensor.nbytes

    def tofile(self, file: BufferedWriter) -> None:
        """Write block by block."""
        for block in self.tensor.iter_blocks(self.source):
            block.tofile(file)


def interleave_rope_rows(rows: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, ...] -> the same with the rows of each head's rotary pairs (i, i + head_dim / 2) adjacent."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def quantize_rows(rows: Tensor, type: Type, name: str) -> NDArray[Any]:
    """[R, C] or [C] float32 -> the same in the file's type; raises `ModelError` for values beyond float16."""
    if type is Type.F16 and not bool((rows.abs() <= torch.finfo(torch.float16).max).all()):
        raise ModelError(f"{name} holds values beyond float16: export with --dtype bf16 or f32")
    if type in K_TYPES:
        return quantize_block(rows.contiguous().numpy(), type, name)
    quantized: NDArray[Any] = gguf.quants.quantize(rows.contiguous().numpy(), type)
    return quantized


def build_tensors(source: ExportSource, arch: GgufArchitecture, dtype: str) -> tuple[GgufTensor, ...]:
    """All tensors of the file, in the order of the stored ones; raises `ModelError` for one that has no name there."""
    gguf_arch = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(gguf_arch, source.config.num_hidden_layers)
    tensors = []
    for stored in source.tensor_files:
        module = stored.rpartition(".")[0].rpartition(".")[2]
        layer = next((int(part) for part in stored.split(".") if part.isdecimal()), None)
        widths = None if layer is None else source.layer_widths[layer]
        if stored == "lm_head.weight" and source.config.tie_word_embeddings:
            continue
        if arch.fused_qkv and module in ("k_proj", "v_proj"):
            continue  # part of the query's tensor
        if widths and module == "input_layernorm" and not widths.query_heads:
            continue  # the layer has no attention to read it
        parts: tuple[str, ...] = (stored,)
        mapped = stored
        if arch.fused_qkv and module == "q_proj":
            parts = tuple(stored.replace("q_proj", projection) for projection in ("q_proj", "k_proj", "v_proj"))
            mapped = stored.replace("q_proj", "qkv_proj")
        name = names.get_name(mapped, (".weight", ".bias"))
        if name is None:
            raise ModelError(f"{source.folder}: llama.cpp's {arch.name} has no place for {stored}: export onnx")
        shapes = [source.shape(part) for part in parts]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        heads = 0
        if arch.interleaved_rope and widths and module in ("q_proj", "k_proj"):
            heads = widths.query_heads if module == "q_proj" else widths.kv_heads
        offset = arch.norm_offset if stored.endswith("norm.weight") else 0.0
        tensors.append(GgufTensor(name, parts, shape, Type.F32, heads, offset))
    types = tensor_types({tensor.name: tensor.shape for tensor in tensors}, dtype)
    return (*(replace(tensor, type=types.get(tensor.name, Type.F32)) for tensor in tensors), *_rope_factors(source))


def tensor_types(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Type]:
    """{matrix: its type in the file}, of {tensor: its shape}; float16 for rows that do not divide into blocks."""
    if dtype in MIXES:
        return mixed_types(shapes, dtype)
    preferred = GGML_TYPES[dtype]
    divides = {name: shape[-1] % gguf.GGML_QUANT_SIZES[preferred][0] == 0 for name, shape in shapes.items()}
    return {name: preferred if divides[name] else Type.F16 for name, shape in shapes.items() if len(shape) > 1}


def _rope_factors(source: ExportSource) -> tuple[GgufTensor, ...]:
    """Llama 3's scaling of positions, which a GGUF file holds as a tensor of divisors of the frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_options(source.config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return ()
    head_dim = head_counts(source.config).head_dim
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))
    unscaled = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (GgufTensor("rope_freqs.weight", (), tuple(scaled.shape), Type.F32, computed=unscaled / scaled),)
