"""Opening a .gguf file: it is dequantised once into a model folder in the cache, and opened from there."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from prunetune.errors import ModelError
from prunetune.utils.failures import reading_model_files
from prunetune.utils.files import atomic_folder, expand_path

STORAGE_DTYPE = torch.bfloat16  # precise enough for values of 4 to 8 bits
SAMPLED_TOKENS = 2000  # of a vocabulary, in the check of its tokenizer


def cache_folder() -> Path:
    """$PRUNETUNE_CACHE; if unset, prunetune/ in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return expand_path(os.environ.get("PRUNETUNE_CACHE") or base / "prunetune")


def dequantize_gguf(file: Path) -> Path:
    """The model folder of a file, with weights in bfloat16; made on first use.

    Raises `ModelError` where transformers cannot read the file or its tokenizer.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status = file.stat()
    key = hashlib.sha256(f"{file.resolve()}/{status.st_size}/{status.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    with reading_model_files(f"model {file}: cannot be read as GGUF", "check the file or fetch it again"):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        is_intact = _tokenizer_is_intact(tokenizer)
    if not is_intact:
        raise ModelError(
            f"model {file}: transformers {transformers.__version__} reads its tokenizer wrongly: words of the "
            "vocabulary come out in pieces; upgrade transformers, or name a folder with the model's own tokenizer"
        )
    # transformers refuses to save a model that was quantised, though its weights are plain again.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    save_in_cache(model.to(STORAGE_DTYPE), tokenizer, folder)
    return folder


def save_in_cache(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model folder of the cache whole; where another process was first, with the same weights, keep its own."""
    process_folder = folder.with_name(f"{folder.name}-{os.getpid()}")
    with atomic_folder(process_folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    try:
        process_folder.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(process_folder)


def _tokenizer_is_intact(tokenizer: Any) -> bool:
    """Whether most words that are one token of the vocabulary are encoded as one token.

    transformers 5.17 mistakes the kind of Gemma's tokenizer and encodes letter by letter, without a warning.
    """
    pieces = (tokenizer.decode([token]) for token in range(0, len(tokenizer), max(1, len(tokenizer) // SAMPLED_TOKENS)))
    words = [piece for piece in pieces if piece.strip().isascii() and piece.strip().isalpha() and len(piece) > 4]
    intact = sum(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in words)
    return 2 * intact >= len(words)
