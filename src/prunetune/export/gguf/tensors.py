"""A model's tensors as llama.cpp wants them: its names, its order of rows, its types; read and made block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedWriter
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.export.gguf.architectures import GgufArchitecture, rope_options
from prunetune.export.source import ExportSource
from prunetune.pruning.families import head_counts

GGML_TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
MAX_BLOCK_VALUES = 2**22  # most values of a tensor that are converted at a time: 16 MiB in float32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file, and how it is made of stored ones."""

    name: str  # "blk.0.attn_q.weight"
    stored_names: tuple[str, ...]  # stored tensors, one below the other
    shape: tuple[int, ...]
    type: Type
    interleaved_heads: int = 0  # whose halves are interleaved; 0: rows stay where they are
    offset: float = 0.0
    computed: Tensor | None = None  # not stored: computed from the configuration

    @property
    def nbytes(self) -> int:
        """In the file."""
        values, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(values) * int(size)

    def iter_blocks(self, source: ExportSource) -> Iterator[NDArray[Any]]:
        """The bytes of the file, some rows at a time."""
        most = max(1, MAX_BLOCK_VALUES // self.shape[-1])
        for part in self.stored_names:
            for rows in (
                source.iter_rows(part, most)
                if not self.interleaved_heads
                else [interleave_rope_rows(source.tensor(part), self.interleaved_heads)]
            ):
                yield quantize_rows(rows.float() + self.offset, self.type, self.name)
        if self.computed is not None:
            yield quantize_rows(self.computed, self.type, self.name)


@dataclass(frozen=True)
class TensorStream:
    """What gguf-py takes for an array: it asks for its size and has it written."""

    tensor: GgufTensor
    source: ExportSource

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.tensor.nbytes

    def tofile(self, file: BufferedWriter) -> None:
        """Write block by block."""
        for block in self.tensor.iter_blocks(self.source):
            block.tofile(file)


def interleave_rope_rows(rows: Tensor, heads: int) -> Tensor:
    """[heads * size, ...]: rotary pairs (i, i + size / 2) of each head become neighbours."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def quantize_rows(rows: Tensor, type: Type, name: str) -> NDArray[Any]:
    """[R, C] or [C] float32 -> the same in the file's type; raises `ModelError` where float16 is too narrow."""
    if type is Type.F16 and not bool((rows.abs() <= torch.finfo(torch.float16).max).all()):
        raise ModelError(f"{name} holds values beyond float16: export with --dtype bf16 or f32")
    made: NDArray[Any] = gguf.quants.quantize(rows.contiguous().numpy(), type)
    return made


def build_tensors(source: ExportSource, arch: GgufArchitecture, dtype: str) -> tuple[GgufTensor, ...]:
    """All tensors of the file, in the order of the stored ones; raises `ModelError` for one that has no place."""
    names = gguf.get_tensor_name_map(_gguf_arch(arch), source.config.num_hidden_layers)
    made = []
    for stored in source.tensor_files:
        module = stored.rpartition(".")[0].rpartition(".")[2]
        layer = _layer_index(stored)
        if stored == "lm_head.weight" and source.config.tie_word_embeddings:
            continue
        if arch.fused_qkv and module in ("k_proj", "v_proj"):
            continue  # made with the query
        if layer is not None and module == "input_layernorm" and not source.layer_widths[layer].query_heads:
            continue  # nothing reads it
        asked = stored.replace("q_proj", "qkv_proj") if arch.fused_qkv and module == "q_proj" else stored
        name = names.get_name(asked, (".weight", ".bias"))
        if name is None:
            raise ModelError(f"{source.folder}: llama.cpp's {arch.name} has no place for {stored}: export onnx")
        made.append(_build_tensor(source, arch, stored, name, dtype))
    return (*made, *_rope_factors(source))


def _gguf_arch(arch: GgufArchitecture) -> gguf.MODEL_ARCH:
    return next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)


def _layer_index(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _build_tensor(source: ExportSource, arch: GgufArchitecture, stored: str, name: str, dtype: str) -> GgufTensor:
    module = stored.rpartition(".")[0].rpartition(".")[2]
    fuses = arch.fused_qkv and module == "q_proj"
    parts = tuple(stored.replace("q_proj", other) for other in ("q_proj", "k_proj", "v_proj")) if fuses else (stored,)
    shapes = [source.shape(part) for part in parts]
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    heads, layer = 0, _layer_index(stored)
    if arch.interleaved_rope and layer is not None and module in ("q_proj", "k_proj"):
        widths = source.layer_widths[layer]
        heads = widths.query_heads if module == "q_proj" else widths.kv_heads
    offset = arch.norm_offset if stored.endswith("norm.weight") else 0.0
    return GgufTensor(name, parts, shape, tensor_type(shape, dtype), heads, offset)


def tensor_type(shape: tuple[int, ...], dtype: str) -> Type:
    """Vectors stay float32; rows that do not divide into blocks, float16."""
    if len(shape) == 1:
        return Type.F32
    wanted = GGML_TYPES[dtype]
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def _rope_factors(source: ExportSource) -> tuple[GgufTensor, ...]:
    """Llama 3's own scaling of positions is a tensor: by how much each frequency is divided."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_options(source.config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return ()
    size = head_counts(source.config).head_dim
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (GgufTensor("rope_freqs.weight", (), tuple(scaled.shape), Type.F32, computed=plain / scaled),)
