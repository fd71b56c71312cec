"""A model's tensors in llama.cpp's names, row order and types; read and converted block by block."""

import copy
import ctypes
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from io import BufferedWriter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from prunetune.errors import ModelError
from prunetune.export.gguf.architectures import GgufArchitecture, rope_options
from prunetune.export.gguf.importance import NO_IMPORTANCE, ImportanceMatrix
from prunetune.export.source import ExportSource
from prunetune.pruning.families import head_counts
from prunetune.utils.optional import require_installed

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
    importance: NDArray[np.float32] | None = None  # of each column; None: all alike

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
                yield quantize_rows(rows.float() + self.offset, self.type, self.name, self.importance)
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


def quantize_rows(rows: Tensor, type: Type, name: str, importance: NDArray[np.float32] | None = None) -> NDArray[Any]:
    """[R, C] or [C] float32 -> the same in the file's type; raises `ModelError` for values beyond float16.

    `importance` [C]: by which llama.cpp weighs squared errors as it chooses scales, in types that look for any.
    """
    if type is Type.F16 and not bool((rows.abs() <= torch.finfo(torch.float16).max).all()):
        raise ModelError(f"{name} holds values beyond float16: export with --dtype bf16 or f32")
    if type in K_TYPES or (importance is not None and type in WEIGHTED_TYPES):
        return quantize_block(rows.contiguous().numpy(), type, name, importance)
    quantized: NDArray[Any] = gguf.quants.quantize(rows.contiguous().numpy(), type)
    return quantized


def build_tensors(
    source: ExportSource, arch: GgufArchitecture, dtype: str, importance: ImportanceMatrix = NO_IMPORTANCE
) -> tuple[GgufTensor, ...]:
    """All tensors of the file, in the order of the stored ones; raises `ModelError` for one that has no name there."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

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
        columns = importance.columns.get(parts[0].removesuffix(".weight"))  # fused parts have the same input
        tensors.append(GgufTensor(name, parts, shape, Type.F32, heads, offset, importance=columns))
    types = tensor_types({tensor.name: tensor.shape for tensor in tensors}, dtype)
    tensors = [replace(tensor, type=types.get(tensor.name, Type.F32)) for tensor in tensors]
    rope = rope_options(source.config)["full_attention"]
    if rope.get("rope_type") == "llama3":  # its scaling of positions is a tensor of divisors of the frequencies
        head_dim = head_counts(source.config).head_dim
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))
        unscaled = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        factors = unscaled / scaled
        tensors.append(GgufTensor("rope_freqs.weight", (), tuple(scaled.shape), Type.F32, computed=factors))
    return tuple(tensors)


def tensor_types(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Type]:
    """{matrix: its type in the file}, of {tensor: its shape}; float16 for rows that do not divide into blocks.

    In a mix (q4_k_m and others), which tensor gets which type follows llama.cpp's own tool (`llama_tensor_get_type`).
    """
    types = {}
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    for name, shape in shapes.items():
        if len(shape) == 1:
            continue
        type = MIXES[dtype].most if dtype in MIXES else GGML_TYPES[dtype]
        if dtype in MIXES:
            mix, kind = MIXES[dtype], name.split(".", 2)[-1] if name.startswith("blk.") else name
            if name == head:
                type = Type.Q6_K  # of the head, or the embedding that it is tied to
            elif kind == "attn_qkv.weight":
                type = mix.fused
            elif kind in FINER_TENSORS:
                layers = sorted(int(other.split(".")[1]) for other in shapes if other.endswith(f".{kind}"))
                index, eighth = layers.index(int(name.split(".")[1])), len(layers) // 8
                is_finer = index < eighth or index >= 7 * len(layers) // 8 or (index - eighth) % 3 == 2
                type = mix.finer if is_finer else mix.most
            if shape[-1] % gguf.GGML_QUANT_SIZES[type][0]:
                type = OF_OTHER_ROWS.get(type, type)
        types[name] = type if shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0 else Type.F16
    return types


@torch.no_grad()
def rounded_as_stored(model: Any, dtype: str, importance: ImportanceMatrix = NO_IMPORTANCE) -> tuple[Any, int]:
    """A copy whose matrices went through the types of a GGUF file and back, and the bytes of that file's tensors.

    Activations stay as they are, where llama.cpp rounds them to 8 bits. Vectors count as float32, as the file has them.
    Raises `MissingPackage` where llama.cpp's library is needed and not installed, `ModelError` for values that are not
    finite.
    """
    if dtype in MIXES:
        require_library(dtype)
    rounded = copy.deepcopy(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.get_text_config().num_hidden_layers)
    weights = {
        names.get_name(name, (".weight", ".bias")) or name: (name, weight)
        for name, weight in rounded.named_parameters()
    }
    types = tensor_types({name: tuple(weight.shape) for name, (_, weight) in weights.items()}, dtype)
    size = 0
    for name, (own, weight) in weights.items():
        type = types.get(name, Type.F32)
        values, block = gguf.GGML_QUANT_SIZES[type]
        size += math.prod(weight.shape) // int(values) * int(block)
        if weight.dim() != 2 or name not in types:
            continue
        columns = importance.columns.get(own.removesuffix(".weight"))
        for rows in weight.data.split(max(1, MAX_BLOCK_VALUES // weight.shape[1])):
            stored = quantize_rows(rows.float().cpu(), type, name, columns)
            rows.copy_(torch.from_numpy(gguf.quants.dequantize(stored, type)))
    return rounded, size


@dataclass(frozen=True)
class Mix:
    """Types of matrices, by what they are."""

    most: Type
    finer: Type  # values and down projections of the first and last eighth of the layers, and of each third between
    fused: Type  # queries, keys and values in one


MIXES = {
    "q4_0": Mix(Type.Q4_0, Type.Q4_0, Type.Q4_0),
    "q5_0": Mix(Type.Q5_0, Type.Q5_0, Type.Q5_0),
    "q4_k_m": Mix(Type.Q4_K, Type.Q6_K, Type.Q5_K),
    "q5_k_m": Mix(Type.Q5_K, Type.Q6_K, Type.Q6_K),
    "q6_k": Mix(Type.Q6_K, Type.Q6_K, Type.Q6_K),
}
OF_OTHER_ROWS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}  # which 256 does not divide
K_TYPES = tuple(OF_OTHER_ROWS)  # the others gguf-py makes, too, to the same bits
WEIGHTED_TYPES = (*K_TYPES, Type.Q4_0, Type.Q5_0, Type.Q5_1)  # whose scales look at the importance of columns
FINER_TENSORS = ("attn_v.weight", "ffn_down.weight")


def require_library(dtype: str) -> None:
    """Raises `MissingPackage` where the package with llama.cpp's library is not installed."""
    require_installed("xllamacpp", extra="llamacpp", use=f"GGUF in {dtype}")


def quantize_block(
    rows: NDArray[np.float32], type: Type, name: str, importance: NDArray[np.float32] | None = None
) -> NDArray[Any]:
    """[R, C] and the importance [C] -> uint8 [R, bytes of a row]; raises `ModelError` for what would end llama.cpp."""
    if not np.isfinite(rows).all():
        raise ModelError(f"{name} holds values that are not finite: export with --dtype f32, and look at the run")
    if importance is not None:
        if importance.shape != rows.shape[1:] or not (np.isfinite(importance) & (importance > 0)).all():
            raise ModelError(
                f"{name} has {rows.shape[1]} columns, and the importance matrix has {importance.size} for it, finite "
                "and above 0 where it is sound: export with --imatrix-tokens 0, and please report this"
            )
        importance = np.ascontiguousarray(importance, np.float32)
    values, size = gguf.GGML_QUANT_SIZES[type]
    blocks = np.empty((rows.shape[0], rows.shape[1] // values * size), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = _quantize_function()(type, rows.ctypes.data, blocks.ctypes.data, 0, *rows.shape, weights)
    if written != blocks.nbytes:
        raise ModelError(f"{name}: llama.cpp made {written} bytes of {type.name}, not {blocks.nbytes}; take q8_0")
    return blocks


@cache
def _quantize_function() -> Any:
    """(type, float32 rows, blocks, first row, rows, values of a row, importance of columns or None) -> bytes written.

    Of llama.cpp's library, which lies inside the wheel of xllamacpp: the Python interface of that does not quantise.
    """
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (library,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
