"""A .gguf file as a model folder: dequantised once, kept in the cache, opened from there like any other model."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from pathlib import Path

import torch

from prunetune.errors import ModelError
from prunetune.files import new_folder

# Wide enough for what 4 to 8 bits held, and the width that users serve.
STORAGE = torch.bfloat16


def cache_folder() -> Path:
    """$PRUNETUNE_CACHE, else prunetune/ in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PRUNETUNE_CACHE") or base / "prunetune")


def dequantised(file: Path) -> Path:
    """The folder with the file's weights in bfloat16, its configuration and its tokenizer; made on first use."""
    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()}/{status.st_size}/{status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if not folder.is_dir():
        _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, struct.error) as broken:
        reason = (str(broken).strip().splitlines() or [type(broken).__name__])[0]
        raise ModelError(
            f"model {file}: cannot be read as GGUF: {reason}; check the file or fetch it again"
        ) from broken
    # A model that remembers being quantised refuses to be saved, though its weights are plain again.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    own = folder.with_name(f"{folder.name}-{os.getpid()}")
    with new_folder(own) as partial:
        model.to(STORAGE).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    try:
        own.rename(folder)
    except OSError:  # another process was first, with the same weights
        if not folder.is_dir():
            raise
        shutil.rmtree(own)
