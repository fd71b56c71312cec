"""Quantisation to types that only llama.cpp can make (k-quants, 4- and 5-bit blocks), through llama-cpp-python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf

from prunetune.errors import MissingPackage, ModelError
from prunetune.utils.failures import last_line
from prunetune.utils.optional import is_installed

KQUANT_BLOCK = 256  # values of a row that a k-quant stores together
KQUANT_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_k_s", "q4_k_m", "q5_0", "q5_k_s", "q5_k_m", "q6_k")


def require_llama_cpp() -> None:
    """Raises `MissingPackage` if llama-cpp-python is not installed."""
    if not is_installed("llama_cpp"):
        raise MissingPackage(
            "k-quants are made by llama.cpp; run: pip install llama-cpp-python (compiling it takes minutes), "
            "or export f16 and run its llama-quantize, or take --dtype q8_0"
        )


# In a process of its own: llama.cpp prints a lot, and ends the process on an error.
QUANTIZE_SCRIPT = """
import sys, llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(kind)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), params))
"""


def quantize(exact: Path, path: Path, name: str) -> tuple[str, ...]:
    """Quantise the file `exact` to the type `name`; returns notes for the export's result.

    Raises `ModelError` if llama.cpp fails.
    """
    file_type = int(gguf.LlamaFileType[f"MOSTLY_{name.upper()}"])
    process = subprocess.run(  # noqa: S603 - our own interpreter and text
        [sys.executable, "-P", "-c", QUANTIZE_SCRIPT, str(exact), str(path), str(file_type)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if process.returncode or not path.is_file():
        last = last_line(process.stderr)
        raise ModelError(f"{path}: llama.cpp could not quantise to {name} ({last}); take --dtype q8_0")
    tensors = gguf.GGUFReader(path).tensors
    fallbacks = sum(len(tensor.shape) > 1 and tensor.shape[0] % KQUANT_BLOCK != 0 for tensor in tensors)
    if not fallbacks:
        return ()
    return (
        f"rows of {fallbacks} tensors do not divide by {KQUANT_BLOCK}: llama.cpp gave them a larger type than {name}",
    )
