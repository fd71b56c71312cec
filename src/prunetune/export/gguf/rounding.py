"""A model with the weights that a GGUF file would hold of it: what its types cost in quality, without llama.cpp."""

from __future__ import annotations

import copy
import math
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type

from prunetune.export.gguf.mixes import MIXES, require_library
from prunetune.export.gguf.tensors import quantize_rows, tensor_types

ROWS_AT_ONCE = 2**22  # values


@torch.no_grad()
def rounded_as_stored(model: Any, dtype: str) -> tuple[Any, int]:
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
        names.get_name(name, (".weight", ".bias")) or name: weight for name, weight in rounded.named_parameters()
    }
    types = tensor_types({name: tuple(weight.shape) for name, weight in weights.items()}, dtype)
    size = 0
    for name, weight in weights.items():
        type = types.get(name, Type.F32)
        values, block = gguf.GGML_QUANT_SIZES[type]
        size += math.prod(weight.shape) // int(values) * int(block)
        if weight.dim() != 2 or name not in types:
            continue
        for rows in weight.data.split(max(1, ROWS_AT_ONCE // weight.shape[1])):
            stored = quantize_rows(rows.float().cpu(), type, name)
            rows.copy_(torch.from_numpy(gguf.quants.dequantize(stored, type)))
    return rounded, size
