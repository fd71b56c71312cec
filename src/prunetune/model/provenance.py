"""Where a model comes from: digests of its files or the commit of a hub model, the runs that pruned it, its licence."""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from prunetune.config.yaml_file import parse_yaml
from prunetune.model.hub_revision import split_revision
from prunetune.model.loading import DEMO, cached_hub_file, demo_file, gguf_file, resolve_model_path
from prunetune.utils.failures import reading_model_files
from prunetune.utils.files import expand_path, sha256
from prunetune.utils.untrusted import parse_json

HISTORY_FILE = "history.json"
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
KINDS = {"model": str, "layout": str, "kept": float, "params": int, "steps": int, "recipe_sha256": str}
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
# Weights, configuration, tokenizer and code. Cards and logs beside them may change.
MODEL_FILE_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of the model that a name means now. Its files are read whole, once, when they are first asked for."""

    name: str  # folder, hub name, .gguf file or `demo`

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """{file name: SHA-256}; of a model in the hub's cache, {"commit": its commit}."""
        from transformers.utils import cached_file

        file = gguf_file(self.name)
        if file is not None:
            return {file.name: sha256(file)}
        folder = Path(str(cached_file(resolve_model_path(self.name), "config.json"))).parent
        if folder.parent.name == "snapshots":
            return {"commit": folder.name}
        files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILE_SUFFIXES and path.is_file())
        with ThreadPoolExecutor() as pool:
            return dict(zip((file.name for file in files), pool.map(sha256, files), strict=True))

    def changes_since(self, before: Mapping[str, str]) -> str:
        """How the files differ from earlier digests, in words; "" where they are the same."""
        now = self.digests
        if "commit" in before and "commit" in now and before != now:
            return f"commit {before['commit']} is now {now['commit']}"
        by_state = {
            "changed": [name for name in before if name in now and now[name] != before[name]],
            "is missing": [name for name in before if name not in now],
            "is new": [name for name in now if name not in before],
        }
        changes = [f"{name} {state}" for state, names in by_state.items() for name in names]
        return ", ".join([*changes[:4], *([f"and {len(changes) - 4} more"] if changes[4:] else [])])


def hub_model(name: str, identity: Mapping[str, str] = MappingProxyType({})) -> str:
    """The model on the hub that a name means, without its revision; "" for others.

    It has to be in the cache, or to be known by a commit to the run that opened it: `identity` of its manifest.
    """
    is_known = "commit" in identity or cached_hub_file(name, "config.json") is not None
    repository = split_revision(name)[0]
    return repository if is_known and HUB_NAME.fullmatch(repository) and not expand_path(name).exists() else ""


def public_model_name(name: str) -> str:
    """The name of a model as it may be published: a path would say where it was."""
    return name if name == DEMO or hub_model(name) else "a local model"


# -- the runs that pruned the model ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PruningRun:
    """One run that pruned a model."""

    model: str  # that it began with, as its recipe names it
    layout: str
    kept: float  # share of the prunable parameters of that model
    params: int  # of the result
    steps: int
    recipe_sha256: str = ""


def read_history(model: str) -> tuple[PruningRun, ...]:
    """The runs that made a model, the first one first; none of a model that no run made, and of results of 0.1.

    Raises `ModelError` for a file that does not say so.
    """
    if (file := _local_file(model, HISTORY_FILE)) is None:
        return ()
    with reading_model_files(f"model {model}: {HISTORY_FILE}", "put it back, or remove it"):
        return tuple(
            PruningRun(**{name: kind(run[name]) for name, kind in KINDS.items()})
            for run in parse_json(file.read_bytes())
        )


def has_per_layer_config(model: str) -> bool:
    """Whether the layers of the model differ already; False where it is not in a folder or the cache."""
    file = _local_file(model, "config.json")
    return file is not None and "per_layer_config" in parse_json(file.read_bytes(), nan=True)


# -- its licence, read without a network -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LicenseInfo:
    """The licence that a base model states; all fields are empty where it states none."""

    id: str = ""  # "apache-2.0", "llama3.2", "other"
    name: str = ""
    link: str = ""
    where: str = ""  # "its model card", "its LICENSE file"


def read_license(model: str) -> LicenseInfo:
    """Read the licence of a folder, a .gguf file, `demo`, or a hub name whose card is in the cache."""
    path = expand_path(model)
    try:
        if model == DEMO or path.suffix == ".gguf":
            from gguf import GGUFReader

            fields = GGUFReader(demo_file() if model == DEMO else path).fields
            keys = {key: fields[key].contents() for key in fields if key.startswith("general.license")}
            return _license_in_values(keys, "general.license", ".", "its .gguf file")
        stated = license_of_card(card_metadata(model), "its model card")
        if stated.id:
            return stated
        file = next((name for name in LICENSE_FILES if (path / name).is_file()), "")
        return LicenseInfo(id="other", where=f"its file {file}") if file else LicenseInfo()
    except Exception:  # of whatever a stranger's files hold; a model card can be written without a licence
        return LicenseInfo()


def card_metadata(name: str, kind: Literal["model", "dataset"] = "model") -> dict[str, Any]:
    """The metadata of the card of a folder or of what is in the hub's cache; empty where there is none to be read."""
    card = _local_file(name, "README.md") if kind == "model" else cached_hub_file(name, "README.md", kind)
    try:
        text = card.read_text(encoding="utf-8", errors="replace") if card else ""
        before, begin, rest = text.partition("---\n")
        front_matter, end, _ = rest.partition("\n---")
        values = parse_yaml(front_matter) if begin and end and not before.strip() else None
    except (OSError, ValueError):
        values = None
    return values if isinstance(values, dict) else {}


def license_of_card(metadata: dict[str, Any], where: str) -> LicenseInfo:
    """The licence that a card states."""
    return _license_in_values(metadata, "license", "_", where)


def _local_file(model: str, name: str) -> Path | None:
    folder = expand_path(model)
    file = folder / name if folder.is_dir() else cached_hub_file(model, name)
    return file if file and file.is_file() else None


def _license_in_values(values: dict[str, Any], key: str, separator: str, where: str) -> LicenseInfo:
    ids = values.get(key)
    first_id = ids[0] if isinstance(ids, list) and ids else ids
    if not first_id:
        return LicenseInfo()
    name, link = (str(values.get(f"{key}{separator}{suffix}") or "") for suffix in ("name", "link"))
    return LicenseInfo(str(first_id), name, link, where)
