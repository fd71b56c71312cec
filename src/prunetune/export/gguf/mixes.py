"""Mixed types of llama.cpp (q4_k_m and others): which tensor gets which, and their bytes, made by the library itself.

The library lies inside the wheel of xllamacpp, whose Python interface does not quantise. Which tensor gets which type
follows llama.cpp's own tool (`llama_tensor_get_type`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from prunetune.errors import ModelError
from prunetune.utils.optional import require_installed


@dataclass(frozen=True)
class Mix:
    """Types of matrices, by what they are."""

    most: Type
    finer: Type  # values and down projections of the first and last eighth of the layers, and of each third between
    fused: Type  # queries, keys and values in one
    head: Type = Type.Q6_K  # or the embedding that it is tied to


MIXES = {
    "q4_0": Mix(Type.Q4_0, Type.Q4_0, Type.Q4_0),
    "q5_0": Mix(Type.Q5_0, Type.Q5_0, Type.Q5_0),
    "q4_k_m": Mix(Type.Q4_K, Type.Q6_K, Type.Q5_K),
    "q5_k_m": Mix(Type.Q5_K, Type.Q6_K, Type.Q6_K),
    "q6_k": Mix(Type.Q6_K, Type.Q6_K, Type.Q6_K),
}
OF_OTHER_ROWS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}  # which 256 does not divide
K_TYPES = tuple(OF_OTHER_ROWS)  # the others gguf-py makes, too, to the same bits
FINER_TENSORS = ("attn_v.weight", "ffn_down.weight")


def require_library(dtype: str) -> None:
    """Raises `MissingPackage` where the package with llama.cpp's library is not installed."""
    require_installed("xllamacpp", extra="llamacpp", use=f"GGUF in {dtype}")


def mixed_types(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> dict[str, Type]:
    """{tensor: its type in the mix `dtype`}, of all matrices of a file, {name: shape}."""
    mix, types = MIXES[dtype], {}
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    for name, shape in shapes.items():
        if len(shape) == 1:
            continue
        kind = name.split(".", 2)[-1] if name.startswith("blk.") else name
        type = mix.most
        if name == head:
            type = mix.head
        elif kind == "attn_qkv.weight":
            type = mix.fused
        elif kind in FINER_TENSORS:
            alike = sorted((other for other in shapes if other.endswith(f".{kind}")), key=_layer)  # 2 before 10
            type = mix.finer if _is_finer(alike.index(name), len(alike)) else mix.most
        if shape[-1] % gguf.GGML_QUANT_SIZES[type][0]:
            type = OF_OTHER_ROWS.get(type, type)
        types[name] = type if shape[-1] % gguf.GGML_QUANT_SIZES[type][0] == 0 else Type.F16
    return types


def _layer(name: str) -> int:
    return int(name.split(".")[1])


def _is_finer(index: int, count: int) -> bool:
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def quantize_block(rows: NDArray[np.float32], type: Type, name: str) -> NDArray[Any]:
    """[R, C] -> uint8 [R, bytes of a row]; raises `ModelError` for values that are not finite, which would end it."""
    if not np.isfinite(rows).all():
        raise ModelError(f"{name} holds values that are not finite: export with --dtype f32, and look at the run")
    values, size = gguf.GGML_QUANT_SIZES[type]
    blocks = np.empty((rows.shape[0], rows.shape[1] // values * size), np.uint8)
    written = _quantize_function()(type, rows.ctypes.data, blocks.ctypes.data, 0, *rows.shape, None)
    if written != blocks.nbytes:
        raise ModelError(f"{name}: llama.cpp made {written} bytes of {type.name}, not {blocks.nbytes}; take q8_0")
    return blocks


@cache
def _quantize_function() -> Any:
    """(type, float32 rows, blocks, first row, rows, values of a row, no weights of importance) -> bytes written."""
    spec = find_spec("xllamacpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (library,) = Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
