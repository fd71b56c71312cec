"""A .gguf file as a model folder: dequantised once, kept in the cache, opened from there like any other model."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import torch

from prunetune.errors import ModelError
from prunetune.utils.failures import first_line
from prunetune.utils.files import atomic_folder

# Wide enough for what 4 to 8 bits held, and the width that users serve.
STORAGE_DTYPE = torch.bfloat16
SAMPLED = 2000  # tokens of a vocabulary that are looked at


def cache_folder() -> Path:
    """$PRUNETUNE_CACHE, else prunetune/ in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PRUNETUNE_CACHE") or base / "prunetune")


def dequantize_gguf(file: Path) -> Path:
    """The folder with the file's weights in bfloat16, its configuration and its tokenizer; made on first use."""
    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()}/{status.st_size}/{status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if not folder.is_dir():
        _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError, struct.error) as broken:
        raise ModelError(
            f"model {file}: cannot be read as GGUF: {first_line(broken)}; check the file or fetch it again"
        ) from broken
    if not _tokenizer_is_intact(tokenizer):
        raise ModelError(
            f"model {file}: transformers {transformers.__version__} reads its tokenizer wrongly: words of the "
            "vocabulary come out in pieces; upgrade transformers, or name a folder with the model's own tokenizer"
        )
    # A model that remembers being quantised refuses to be saved, though its weights are plain again.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    own = folder.with_name(f"{folder.name}-{os.getpid()}")
    with atomic_folder(own) as partial:
        model.to(STORAGE_DTYPE).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    try:
        own.rename(folder)
    except OSError:  # another process was first, with the same weights
        if not folder.is_dir():
            raise
        shutil.rmtree(own)


def _tokenizer_is_intact(tokenizer: Any) -> bool:
    """Whether most words that are one token of the vocabulary are one when read as text.

    transformers 5.17 takes Gemma's for another kind and reads it letter by letter, without a word.
    """
    pieces = (tokenizer.decode([token]) for token in range(0, len(tokenizer), max(1, len(tokenizer) // SAMPLED)))
    words = [piece for piece in pieces if piece.strip().isascii() and piece.strip().isalpha() and len(piece) > 4]
    whole = sum(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in words)
    return 2 * whole >= len(words)
