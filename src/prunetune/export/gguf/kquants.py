"""Types that only llama.cpp can make (k-quants and the 4- and 5-bit blocks), through llama-cpp-python."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import torch

from prunetune.errors import MissingPackage, ModelError

BLOCK = 256  # values of a row that a k-quant takes together
KQUANT_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q4_k_m", "q5_0", "q5_k_s", "q5_k_m", "q6_k")


def unquantized_dtype(dtype: torch.dtype) -> str:
    """The type of the file that is quantised: as the weights are stored."""
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")


def require_llama_cpp() -> None:
    """Raises `MissingPackage` before anything is written."""
    if find_spec("llama_cpp") is None:
        raise MissingPackage(
            "k-quants are made by llama.cpp; run: pip install llama-cpp-python (it is built, which takes minutes), "
            "or export f16 and run its llama-quantize, or take --dtype q8_0"
        )


# In a process of its own: llama.cpp writes much, and ends the process where it cannot go on.
QUANTIZE = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(kind)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


def quantize(file: Path, place: Path, name: str) -> tuple[str, ...]:
    """Make the type's mix of the exact file; returns what is to be told. Raises `ModelError`."""
    kind = int(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"])
    done = subprocess.run(  # noqa: S603 - our own interpreter and text
        [sys.executable, "-c", QUANTIZE, str(file), str(place), str(kind)], capture_output=True, text=True, check=False
    )
    if done.returncode or not place.is_file():
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelError(f"{place}: llama.cpp could not quantise to {name} ({last}); take --dtype q8_0")
    odd = sum(len(tensor.shape) > 1 and tensor.shape[0] % BLOCK != 0 for tensor in gguf.GGUFReader(place).tensors)
    if not odd:
        return ()
    return (f"rows of {odd} tensors do not divide by {BLOCK}: llama.cpp gave them a larger type than {name}",)
