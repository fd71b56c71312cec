"""Hostile files: payloads that write a marker file, the folder they lie in, and how such a file is tried."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunetune.config.recipe import DataConfig
from prunetune.data.encoding import encode_prompts
from prunetune.data.records import Message
from prunetune.data.sources import read_records
from prunetune.errors import PrunetuneError
from prunetune.evaluation.suites import evaluate_suite, load_suite
from prunetune.model.checksums import write_checksums
from prunetune.model.loading import load_model_and_tokenizer
from support.data import write_lines
from support.evaluation import question
from support.suites import ScriptedBackend, open_rows

CHAT = question(0, kind="chat", messages=(Message("user", "Where?"),))


class Payload:
    """Unpickled, it writes the marker."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (self.code,)


@dataclass
class Place:
    """A folder with a tiny model, a per-layer run and rows; and payloads that write a marker."""

    folder: Path
    templates: Path

    @property
    def marker(self) -> Path:
        return self.folder / "marker"

    @property
    def code(self) -> str:
        return f"open({str(self.marker)!r}, 'w').close()\n"

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(Payload(self.code), protocol=2)

    @property
    def torch_pickled(self) -> bytes:
        """As `torch.save` would write it."""
        file = self.folder / "payload.pt"
        torch.save({"model.norm.weight": Payload(self.code)}, file)
        return file.read_bytes()

    @property
    def tag(self) -> str:
        """A YAML tag that calls a function."""
        return f"!!python/object/apply:builtins.exec [{json.dumps(self.code)}]"

    def write(self, name: str, content: str | bytes | dict[str, Any]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content) if isinstance(content, dict) else content, encoding="utf-8")
        return path

    def edit(self, name: str, **changes: Any) -> None:
        self.write(name, json.loads((self.folder / name).read_text()) | changes)

    def model(self, *, evil: bool = True, **config: Any) -> Path:
        """A model folder, with `evil.py`, and changes of its config.json."""
        folder = self.folder / "model"
        shutil.copytree(self.templates / "model", folder)
        self.edit("model/config.json", **config)
        if evil:
            self.write("model/evil.py", self.code + "class Evil: pass\n")
        return folder

    def run(self, **config: Any) -> Path:
        """A per-layer run folder, whose model's config.json is changed."""
        folder = self.folder / "run"
        shutil.copytree(self.templates / "run", folder)
        self.edit("run/model/config.json", **config)
        for name in ("modeling_pruned.py", "configuration_pruned.py"):
            self.write(f"run/model/{name}", self.code + (folder / "model" / name).read_text())
        write_checksums(folder / "model")
        return folder

    def suite(self, text: str) -> None:
        """Evaluate a suite of this text on a backend that answers at once."""
        write_lines(self.folder / "rows.jsonl", *open_rows(1))
        suite = load_suite(self.write("suite.yaml", text), strict=False)
        evaluation = evaluate_suite(ScriptedBackend(), suite)
        if error := next((result.error for result in evaluation.tasks.values() if result.error), ""):
            raise PrunetuneError(error)

    def data(self, name: str) -> None:
        """Read a data file."""
        read_records([name], DataConfig(root=str(self.folder), train=(name,)), "train")


def load(folder: Path | str, **options: Any) -> None:
    """Load a model as every command does, encode a chat by its template, and run it."""
    loaded = load_model_and_tokenizer(str(folder), device=torch.device("cpu"), dtype=torch.float32, **options)
    ids = encode_prompts([CHAT], loaded.tokenizer, "auto")[0]
    loaded.model(torch.tensor([list(ids)[:8] or [1]]))


class Artefacts(dict[str, Callable[[Place], Any]]):
    """Hostile files by name; as a decorator, it adds a function that writes one and opens it."""

    def __call__(self, open_it: Callable[[Place], Any]) -> Callable[[Place], Any]:
        self[open_it.__name__.replace("_", " ")] = open_it
        return open_it


def check_runs_nothing(open_it: Callable[[Place], Any], place: Place) -> None:
    """Write the file and open it: it ends well or in one line, and the marker is not there."""
    refusal = ""
    try:
        open_it(place)
    except PrunetuneError as refused:
        refusal = str(refused)
    assert "\n" not in refusal
    assert not place.marker.exists()
