"""Types that only llama.cpp can make (k-quants and the 4- and 5-bit blocks), through llama-cpp-python."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import gguf
import torch

from prunetune.errors import MissingPackage, ModelError

NAMES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q4_k_m", "q5_0", "q5_k_s", "q5_k_m", "q6_k")


def exact(dtype: torch.dtype) -> str:
    """The type of the file that is quantised: as the weights are stored."""
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")


def need() -> None:
    """Raises `MissingPackage` before anything is written."""
    if find_spec("llama_cpp") is None:
        raise MissingPackage(
            "k-quants are made by llama.cpp; run: pip install llama-cpp-python (it is built, which takes minutes), "
            "or export f16 and run its llama-quantize, or take --dtype q8_0"
        )


def quantize(file: Path, place: Path, name: str) -> None:
    """Rows that do not divide into a type's blocks get another one: llama.cpp chooses it. Raises `ModelError`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"])
    if llama_cpp.llama_model_quantize(str(file).encode(), str(place).encode(), params):
        raise ModelError(f"{place}: llama.cpp could not quantise to {name}; take --dtype q8_0")
