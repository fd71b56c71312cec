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
from prunetune.export.gguf.architectures import Architecture, ropes_of
from prunetune.export.source import Source
from prunetune.pruning.families import heads_of

TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
BLOCK = 2**22  # most values of a tensor that are converted at a time: 16 MiB in float32


@dataclass(frozen=True)
class Made:
    """One tensor of the file, and how it is made of stored ones."""

    name: str  # "blk.0.attn_q.weight"
    parts: tuple[str, ...]  # stored tensors, one below the other
    shape: tuple[int, ...]
    type: Type
    heads: int = 0  # whose halves are interleaved; 0: rows stay where they are
    offset: float = 0.0
    given: Tensor | None = None  # not stored: computed from the configuration

    @property
    def nbytes(self) -> int:
        """In the file."""
        values, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // int(values) * int(size)

    def blocks(self, source: Source) -> Iterator[NDArray[Any]]:
        """The bytes of the file, some rows at a time."""
        most = max(1, BLOCK // self.shape[-1])
        for part in self.parts:
            for rows in source.rows(part, most) if not self.heads else [interleaved(source.tensor(part), self.heads)]:
                yield quantized(rows.float() + self.offset, self.type, self.name)
        if self.given is not None:
            yield quantized(self.given, self.type, self.name)


@dataclass(frozen=True)
class Stream:
    """What gguf-py takes for an array: it asks for its size and has it written."""

    made: Made
    source: Source

    @property
    def nbytes(self) -> int:
        """In the file."""
        return self.made.nbytes

    def tofile(self, file: BufferedWriter) -> None:
        """Write block by block."""
        for block in self.made.blocks(self.source):
            block.tofile(file)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """[heads * size, ...]: rotary pairs (i, i + size / 2) of each head become neighbours."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def quantized(rows: Tensor, type: Type, name: str) -> NDArray[Any]:
    """[R, C] or [C] float32 -> the same in the file's type; raises `ModelError` where float16 is too narrow."""
    if type is Type.F16 and not bool((rows.abs() <= torch.finfo(torch.float16).max).all()):
        raise ModelError(f"{name} holds values beyond float16: export with --dtype bf16 or f32")
    made: NDArray[Any] = gguf.quants.quantize(rows.contiguous().numpy(), type)
    return made


def tensors_of(source: Source, arch: Architecture, dtype: str) -> tuple[Made, ...]:
    """All tensors of the file, in the order of the stored ones; raises `ModelError` for one that has no place."""
    names = gguf.get_tensor_name_map(_known(arch), source.config.num_hidden_layers)
    made = []
    for stored in source.places:
        module = stored.rpartition(".")[0].rpartition(".")[2]
        layer = _layer(stored)
        if stored == "lm_head.weight" and source.config.tie_word_embeddings:
            continue
        if arch.fused and module in ("k_proj", "v_proj"):
            continue  # made with the query
        if layer is not None and module == "input_layernorm" and not source.widths[layer].queries:
            continue  # nothing reads it
        asked = stored.replace("q_proj", "qkv_proj") if arch.fused and module == "q_proj" else stored
        name = names.get_name(asked, (".weight", ".bias"))
        if name is None:
            raise ModelError(f"{source.folder}: llama.cpp's {arch.name} has no place for {stored}: export onnx")
        made.append(_made(source, arch, stored, name, dtype))
    return (*made, *_factors(source))


def _known(arch: Architecture) -> gguf.MODEL_ARCH:
    return next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _made(source: Source, arch: Architecture, stored: str, name: str, dtype: str) -> Made:
    module = stored.rpartition(".")[0].rpartition(".")[2]
    fuses = arch.fused and module == "q_proj"
    parts = tuple(stored.replace("q_proj", other) for other in ("q_proj", "k_proj", "v_proj")) if fuses else (stored,)
    shapes = [source.shape(part) for part in parts]
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    heads, layer = 0, _layer(stored)
    if arch.paired and layer is not None and module in ("q_proj", "k_proj"):
        widths = source.widths[layer]
        heads = widths.queries if module == "q_proj" else widths.groups
    offset = arch.offset if stored.endswith("norm.weight") else 0.0
    return Made(name, parts, shape, type_of(shape, dtype), heads, offset)


def type_of(shape: tuple[int, ...], dtype: str) -> Type:
    """Vectors stay float32; rows that do not divide into blocks, float16."""
    if len(shape) == 1:
        return Type.F32
    wanted = TYPES[dtype]
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def _factors(source: Source) -> tuple[Made, ...]:
    """Llama 3's own scaling of positions is a tensor: by how much each frequency is divided."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = ropes_of(source.config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return ()
    size = heads_of(source.config).size
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (Made("rope_freqs.weight", (), tuple(scaled.shape), Type.F32, given=plain / scaled),)
