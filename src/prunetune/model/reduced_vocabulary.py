"""A model with fewer tokens: its tokenizer in memory, and its folder, written file by file, one shard in memory."""

import copy
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from prunetune.errors import ModelError
from prunetune.model.checksums import CHECKSUM_FILE, verify_checksums, write_checksums
from prunetune.model.hub_revision import fetch_revision
from prunetune.model.loading import load_meta_model, load_tokenizer, resolve_model_path
from prunetune.model.safetensors_reader import INDEX_FILE, safetensors_files
from prunetune.pruning.vocabulary import (
    KeptVocabulary,
    choose_tokens,
    prune_config,
    prune_tokenizer,
    token_ids_in,
    vocabulary_tensors,
)
from prunetune.utils.failures import reading_model_files
from prunetune.utils.files import atomic_folder
from prunetune.utils.untrusted import parse_json, read_text

VOCABULARY_FILE = "vocabulary.json"  # which tokens of the original model were kept
CONFIG_FILES = ("config.json", "generation_config.json")
REWRITTEN_FILES = {
    CHECKSUM_FILE, INDEX_FILE, VOCABULARY_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
COPIED_SUFFIXES = (".json", ".py", ".md", ".txt", "")  # configurations, code, card, licence


def choose_vocabulary(
    name: str, meta_model: Any, tokenizer: Any, size: str, counts: Mapping[int, int]
) -> KeptVocabulary:
    """The tokens to keep of a model, `counts` being those of its data; see `choose_tokens`.

    Raises `ModelError` where tokenizer or model cannot be pruned, and `ConfigError` for a size that is too small.
    """
    from transformers import GenerationConfig

    vocabulary_tensors(meta_model)  # raises for a model that cannot be pruned
    named_ids = token_ids_in(meta_model.config.to_dict()) | set(tokenizer.all_special_ids)
    with suppress(OSError):  # there is no generation_config.json
        named_ids |= token_ids_in(GenerationConfig.from_pretrained(resolve_model_path(name)).to_dict())
    rows = meta_model.get_input_embeddings().weight.shape[0]
    return choose_tokens(
        tokenizer_json(name, tokenizer),
        size,
        counts=counts,
        named_ids={token for token in named_ids if token < rows},
        rows=rows,
        params=sum(parameter.numel() for parameter in meta_model.parameters()),
    )


def tokenizer_json(name: str, tokenizer: Any) -> dict[str, Any]:
    """What `tokenizers` writes of a tokenizer; raises `ModelError` for one with code of its own."""
    if not getattr(tokenizer, "is_fast", False) or type(tokenizer).__module__.startswith("transformers_modules"):
        raise ModelError(
            f"budget.vocab: the tokenizer of {name} is {type(tokenizer).__name__}, which has code of its own, and only "
            "tokenizers that are a tokenizer.json can be pruned: leave budget.vocab out"
        )
    values: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return values | {"padding": None, "truncation": None}  # which are of a call


def reduce_tokenizer(name: str, tokenizer: Any, vocabulary: KeptVocabulary) -> Any:
    """The tokenizer with the kept tokens only; the given one is unchanged."""
    from tokenizers import Tokenizer

    reduced = copy.deepcopy(tokenizer)
    reduced._tokenizer = Tokenizer.from_str(json.dumps(prune_tokenizer(tokenizer_json(name, tokenizer), vocabulary)))
    return reduced


def write_reduced_model(
    name: str, vocabulary: KeptVocabulary, folder: Path, *, trust_remote_code: bool = False
) -> None:
    """Write the folder of a model with the kept tokens only, whole or not at all; dtype and all else are the model's.

    Raises `ModelError` where the tokenizer that was written does not open as it was.
    """
    meta_model = load_meta_model(name, trust_remote_code=trust_remote_code)
    tokenizer = reduce_tokenizer(name, load_tokenizer(name, trust_remote_code=trust_remote_code), vocabulary)
    source = Path(resolve_model_path(name))
    source = source if source.is_dir() else fetch_revision(name)
    with atomic_folder(folder) as partial:
        for file in sorted(source.iterdir()):
            if file.name in CONFIG_FILES:
                values = prune_config(parse_json(file.read_bytes(), nan=True), vocabulary)
                (partial / file.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            elif file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in REWRITTEN_FILES:
                shutil.copyfile(file, partial / file.name)
        _write_weights(source, partial, meta_model, vocabulary)
        tokenizer.save_pretrained(partial)
        (partial / VOCABULARY_FILE).write_text(json.dumps(asdict(vocabulary)) + "\n", encoding="utf-8")
        reopened = tokenizer_json(name, load_tokenizer(str(partial), trust_remote_code=trust_remote_code))
        if changed := [key for key, value in tokenizer_json(name, tokenizer).items() if reopened[key] != value]:
            raise ModelError(
                f"budget.vocab: the tokenizer of {name}, written with {vocabulary.rows:,} tokens, opens with another "
                f"{changed[0]}, because its class makes its own: leave budget.vocab out"
            )
        write_checksums(partial)


def _write_weights(source: Path, folder: Path, meta_model: Any, vocabulary: KeptVocabulary) -> None:
    """Write every weight file anew, with the kept rows of embedding and head, and an index if there are several."""
    # Files may hold longer or shorter names than the model's class: the last two parts are the same.
    ends = {tuple(name.split(".")[-2:]) for name in vocabulary_tensors(meta_model)}
    files, homes, size = safetensors_files(source), {}, 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
            metadata = opened.metadata()
        for key, tensor in tensors.items():
            if tuple(key.split(".")[-2:]) in ends and tensor.shape[0] == vocabulary.original_rows:
                tensors[key] = vocabulary.gather(tensor)
            homes[key], size = file.name, size + tensors[key].nbytes
        save_file(tensors, folder / file.name, metadata)
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": homes}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


# -- the folder in a run -----------------------------------------------------------------------------------------------


def reduced_folder(run: Path) -> Path:
    """Where a run writes its dense model with a pruned vocabulary; the sizes of a run share that of the run around."""
    return (run.parent.parent if run.parent.name == "sizes" else run) / "base"


def reduced_model_of(run: Path) -> Path | None:
    """The folder of a run's dense model with a pruned vocabulary; None where none is written."""
    folder = reduced_folder(run)
    return folder if (folder / VOCABULARY_FILE).is_file() else None


def read_vocabulary(folder: Path) -> KeptVocabulary:
    """The tokens that the reduced model in a folder kept; raises `ModelError` where a file is not what was written."""
    verify_checksums(folder)
    with reading_model_files(f"{folder}/{VOCABULARY_FILE} cannot be read", "remove the folder, to have it made anew"):
        values = parse_json(read_text(folder / VOCABULARY_FILE))
        return KeptVocabulary(**{**values, "kept": tuple(values["kept"])})
