"""Folders that hold a LoRA adapter of PEFT: written, and merged into their base once and kept in the cache."""

import hashlib
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunetune.errors import ModelError
from prunetune.model.checksums import verify_checksums, write_checksums
from prunetune.model.gguf_import import cache_folder, save_in_cache
from prunetune.model.loading import cached_hub_file, load_model_and_tokenizer, load_tokenizer, resolve_model_path
from prunetune.utils.failures import reading_model_files
from prunetune.utils.files import atomic_folder, sha256
from prunetune.utils.untrusted import parse_json, shorten

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def merge_adapter_folder(name: str, folder: Path) -> Path:
    """The model folder of an adapter and its base, in the dtype of the base; made on first use.

    Raises `ModelError` for adapters other than LoRA or that repeat layers, and where base and adapter do not fit.
    """
    config, base = _read_config(name, folder)
    verify_checksums(folder)
    kind, other = config.get("peft_type"), next(filter(config.get, ("megatron_config", "layer_replication")), "")
    if kind != "LORA" or other:
        raise ModelError(
            f"model {name}: an adapter of type {kind}{f' with {other}' if other else ''}, and only LoRA is merged "
            "here: merge it first, by PEFT's merge_and_unload(), and name the folder that its save_pretrained writes"
        )
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"model {name}: an adapter without {WEIGHTS_FILE}; save it again, as safetensors")
    chain, at = {folder.resolve()}, Path(base)  # an adapter's base may be an adapter
    while at.resolve() not in chain and (at / CONFIG_FILE).is_file():
        chain.add(at.resolve())
        at = Path(_read_config(name, at)[1])
    if not base or at.resolve() in chain:
        raise ModelError(f"model {name}: an adapter whose {CONFIG_FILE} names no base (base_model_name_or_path)")
    try:
        path = Path(resolve_model_path(base))
    except ModelError as missing:
        raise ModelError(
            f"model {name}: an adapter of {base}, which is not here ({missing}); correct {CONFIG_FILE}"
        ) from missing
    place = path if path.is_dir() else cached_hub_file(base, "config.json")  # whose path has the commit
    digests = [sha256(folder / WEIGHTS_FILE), sha256(folder / CONFIG_FILE), f"{base}/{place}"]
    digests += [f"{file.name}/{file.stat().st_size}/{file.stat().st_mtime_ns}" for file in sorted(path.glob("*.*"))]
    key = hashlib.sha256("/".join(digests).encode()).hexdigest()[:16]
    merged = cache_folder() / "adapters" / f"{folder.resolve().name}-{key}"
    if not merged.is_dir():
        _merge(name, base, folder, merged)
    return merged


def _read_config(name: str, folder: Path) -> tuple[dict[str, Any], str]:
    """An adapter's configuration and its base: a path from the current folder, or else from the adapter's."""
    with reading_model_files(f"model {name}: {CONFIG_FILE}", "save the adapter again"):
        config = dict(parse_json((folder / CONFIG_FILE).read_bytes()))
        base = str(config.get("base_model_name_or_path") or "")
        patterns = {**(config.get("rank_pattern") or {}), **(config.get("alpha_pattern") or {})}
        if costly := next((key for key in patterns if re.search(r"[(\[{]|[*+].*[*+]", key)), ""):  # may take forever
            raise ValueError(f"it holds the pattern {shorten(costly)}, where names of modules are read")
        is_inside = (folder / base).resolve().is_dir() and not Path(base).is_dir()
    return config, str(folder / base) if is_inside else base


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
        write_checksums(partial)


def _merge(name: str, base: str, folder: Path, merged: Path) -> None:
    from peft import PeftConfig, PeftModel
    from safetensors import safe_open
    from transformers import AutoTokenizer

    try:
        loaded = load_model_and_tokenizer(base, device=torch.device("cpu"), dtype=torch.float32)
    except ModelError as missing:
        raise ModelError(f"model {name}: an adapter, and its base cannot be opened ({missing})") from missing
    model: Any = loaded.model
    with reading_model_files(f"model {name}: an adapter that does not fit {base}", "name its base, or save it again"):
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 - no mapping
        rows = [shape[0] for key, shape in shapes.items() if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
        if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows[0])
        config: Any = PeftConfig.from_pretrained(str(folder))
        if isinstance(config.target_modules, str):  # a pattern, which may take forever: the file names what it matches
            modules = {key.removeprefix("base_model.model.").split(".lora_")[0] for key in shapes if ".lora_" in key}
            config.target_modules = sorted(modules)
        config.exclude_modules = config.layers_pattern = None
        with warnings.catch_warnings():  # PEFT reads a property that transformers deprecates
            warnings.simplefilter("ignore", FutureWarning)
            adapted: Any = PeftModel.from_pretrained(model, folder, config=config)
        model = adapted.merge_and_unload(safe_merge=True)
    if (folder / "tokenizer.json").is_file():
        with reading_model_files(
            f"model {name}: its tokenizer cannot be read", "remove it, so that its base's is used"
        ):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    else:
        tokenizer = load_tokenizer(base)
    save_in_cache(model.to(loaded.checkpoint_dtype), tokenizer, merged)
