"""What identifies a base model: the SHA-256 of each of its files, or the commit of a hub model."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prunetune.model.loading import gguf_file, resolve_model_path
from prunetune.utils.files import sha256

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
