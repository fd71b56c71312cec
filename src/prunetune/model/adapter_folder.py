"""Folders that hold a LoRA adapter of PEFT: written, and merged into their base once and kept in the cache."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunetune.errors import ModelError
from prunetune.model.gguf_import import cache_folder, save_in_cache
from prunetune.model.loading import load_model_and_tokenizer, load_tokenizer, resolve_model_path
from prunetune.utils.failures import reading_model_files
from prunetune.utils.files import atomic_folder, sha256
from prunetune.utils.untrusted import parse_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def merge_adapter_folder(name: str, folder: Path) -> Path:
    """The model folder of an adapter and its base, in the dtype of the base; made on first use.

    Raises `ModelError` for adapters other than LoRA, and where base and adapter do not fit.
    """
    with reading_model_files(f"model {name}: {CONFIG_FILE}", "save the adapter again"):
        config = dict(parse_json((folder / CONFIG_FILE).read_bytes()))
        base, kind = str(config.get("base_model_name_or_path") or ""), config.get("peft_type")
    if kind != "LORA" or config.get("megatron_config"):
        raise ModelError(
            f"model {name}: an adapter of type {kind}, and only LoRA is merged here: merge it first, by PEFT's "
            "merge_and_unload(), and name the folder that its save_pretrained writes"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"model {name}: an adapter without {WEIGHTS_FILE}; save it again, as safetensors")
    if (folder / base).is_dir():  # relative to the adapter, where it is not to the current folder
        base = base if Path(base).is_dir() else str(folder / base)
    if not base or Path(base).resolve() == folder.resolve():
        raise ModelError(f"model {name}: an adapter whose {CONFIG_FILE} names no base (base_model_name_or_path)")
    try:
        path = Path(resolve_model_path(base))
    except ModelError as missing:
        raise ModelError(
            f"model {name}: an adapter of {base}, which is not here ({missing}); correct base_model_name_or_path in "
            f"{CONFIG_FILE}"
        ) from missing
    digests = [sha256(folder / WEIGHTS_FILE), sha256(folder / CONFIG_FILE), str(path)]
    digests += [f"{file.name}/{file.stat().st_size}/{file.stat().st_mtime_ns}" for file in sorted(path.glob("*.*"))]
    key = hashlib.sha256("/".join(digests).encode()).hexdigest()[:16]
    merged = cache_folder() / "adapters" / f"{folder.resolve().name}-{key}"
    if not merged.is_dir():
        _merge(name, base, folder, merged)
    return merged


def write_adapter_folder(model: Any, folder: Path, base: str) -> None:
    """Write the LoRA adapters of a model as a folder that PEFT and this package open; `base` is their model's name."""
    from peft import PeftConfig
    from safetensors.torch import save_file

    ((adapter, config),) = model.peft_config.items()
    config = replace(config, base_model_name_or_path=base, task_type="CAUSAL_LM", inference_mode=True)
    weights = {
        f"base_model.model.{name.replace(f'.{adapter}.', '.')}": weight.detach().contiguous()
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }
    with atomic_folder(folder) as partial:
        PeftConfig.save_pretrained(config, str(partial))
        save_file(weights, partial / WEIGHTS_FILE, {"format": "pt"})


def _merge(name: str, base: str, folder: Path, merged: Path) -> None:
    from peft import PeftModel
    from safetensors import safe_open

    try:
        loaded = load_model_and_tokenizer(base, device=torch.device("cpu"), dtype=torch.float32)
    except ModelError as missing:
        raise ModelError(f"model {name}: an adapter, and its base cannot be opened ({missing})") from missing
    model: Any = loaded.model
    with reading_model_files(
        f"model {name}: an adapter that does not fit {base}", "name its own base, or save it again"
    ):
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 - no mapping
        rows = [shape[0] for key, shape in shapes.items() if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
        if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows[0])
        with warnings.catch_warnings():  # PEFT reads a property that transformers deprecates
            warnings.simplefilter("ignore", FutureWarning)
            adapted: Any = PeftModel.from_pretrained(model, folder)
        model = adapted.merge_and_unload(safe_merge=True)
    tokenizer = load_tokenizer(base) if not (folder / "tokenizer.json").is_file() else _own_tokenizer(name, folder)
    save_in_cache(model.to(loaded.checkpoint_dtype), tokenizer, merged)


def _own_tokenizer(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with reading_model_files(f"model {name}: its tokenizer cannot be read", "remove it, so that its base's is used"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
