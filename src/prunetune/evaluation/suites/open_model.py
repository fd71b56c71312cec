"""What `eval` and `check` are given: a run, a checkpoint, a hub name, a .gguf file, an endpoint, or kept results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prunetune.config.recipe import RunConfig, kept_recipe
from prunetune.errors import DataError, ModelError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites.cache import Remembered, Store, files_hash, folder_hash
from prunetune.evaluation.suites.endpoint import Endpoint
from prunetune.evaluation.suites.http_client import Server
from prunetune.evaluation.suites.llamacpp import LlamaCpp
from prunetune.evaluation.suites.local import MAX_TOKENS, LocalModel
from prunetune.evaluation.suites.protocol import Ask, Manner, Respondent, Tick
from prunetune.model.loading import load, load_config, load_tokenizer, locate, pick_device, pick_dtype


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """How a model is opened and asked."""

    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_tokens: int = MAX_TOKENS  # of one scoring pass
    cache: bool = True
    model_name: str = ""  # at an endpoint
    key_env: str = ""
    timeout: float = 60.0  # seconds for a reply


def open_target(name: str, options: TargetOptions, store: Store | None = None) -> Respondent | Evaluation:
    """Whatever the name stands for; weights are read when a question needs them. Raises a `PrunetuneError`."""
    if name.startswith(("http://", "https://")):
        return Endpoint(Server(name, key_env=options.key_env, timeout=options.timeout), options.model_name)
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return _kept(path)
    store = store or Store()
    pick_device(options.device)  # refuses in time
    if path.suffix == ".gguf":
        return _remembered(_gguf(path, options, store), store, options)
    source, trust = checkpoint_of(name, trust_remote_code=options.trust_remote_code)
    return _remembered(Checkpoint(source, options, store, trust=trust), store, options)


def refuse_unopenable(name: str, options: TargetOptions) -> None:
    """Raise now what opening a name would raise later, as far as is known before weights are read and servers asked."""
    target = open_target(name, options)
    found = target.respondent if isinstance(target, Remembered) else target
    if isinstance(found, Checkpoint):
        load_config(found.name, trust_remote_code=found.trusted)
        load_tokenizer(found.name, trust_remote_code=found.trusted)


def checkpoint_of(name: str, *, trust_remote_code: bool) -> tuple[str, bool]:
    """The folder or hub name that a run or a name stands for, and whether code in it may run; raises `ModelError`."""
    path = Path(name).expanduser()
    run = run_config(path)
    if run is None:
        locate(name)  # refuses in time
        return name, trust_remote_code
    folder = path / "model"
    if not folder.is_dir() and sizes_in(path):
        raise ModelError(f"{path}: this run has several sizes; name one of {', '.join(map(str, sizes_in(path)))}")
    if not folder.is_dir():
        raise ModelError(f"{path}: this run has no model yet; go on with it by prunetune run RECIPE --resume")
    # What opens here is code that the run generated and checked.
    return str(folder), trust_remote_code or run.layout == "per-layer"


def gguf_at(path: Path) -> Path:
    """A .gguf file that is there; raises `ModelError`."""
    if not path.is_file():
        raise ModelError(f"model {path}: no such file; name a .gguf file, a model folder or a hub name")
    return path


def reference_of(name: str) -> str:
    """The dense model that a run began with, a .gguf file dequantised, as the run opened it; raises `ModelError`."""
    run = run_config(Path(name).expanduser())
    if run is None:
        raise ModelError(f"{name} is no run folder, so what to check it against has to be named with --against")
    return locate(run.model)


def run_config(path: Path) -> RunConfig | None:
    """The recipe of a run folder; None for what is none."""
    recipe = path / "config.yaml"
    if not recipe.is_file() or (path / "config.json").exists():
        return None
    return kept_recipe(recipe)


def sizes_in(run: Path) -> list[Path]:
    """The folders of a run of several sizes that have a model, the largest first; each is a run folder itself."""
    found = [place for place in (run / "sizes").glob("*") if (place / "model").is_dir()]
    return sorted(found, key=lambda place: place.name, reverse=True)  # "0.8", "0.65": shares


def _kept(path: Path) -> Evaluation:
    try:
        return Evaluation.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as missing:
        raise DataError(f"{path}: cannot be read ({missing}); name what prunetune eval --out wrote") from missing
    except DataError as odd:
        raise DataError(f"{path}: {odd}") from odd


def _gguf(path: Path, options: TargetOptions, store: Store) -> LlamaCpp:
    return LlamaCpp(gguf_at(path), f"llama.cpp {files_hash([path], store)}", timeout=max(options.timeout, 600.0))


def _remembered(respondent: Respondent, store: Store, options: TargetOptions) -> Respondent:
    return Remembered(respondent, store) if options.cache else respondent


@dataclass(frozen=True)
class Checkpoint:
    """A model folder or hub name; its weights are read at the first question that was not asked before."""

    name: str
    options: TargetOptions
    store: Store
    trust: bool | None = None

    @property
    def trusted(self) -> bool:
        """Whether code in its folder may run."""
        return self.options.trust_remote_code if self.trust is None else self.trust

    @cached_property
    def _folder(self) -> Path:
        """Where its files are: a hub name's lie together once they are fetched."""
        place = Path(locate(self.name))
        if place.is_dir():
            return place
        from transformers.utils import cached_file

        self.loaded()  # the weights have to be here to be hashed
        return Path(cached_file(self.name, "config.json")).parent

    @cached_property
    def fingerprint(self) -> str:
        """Of weights, configuration and tokenizer, and of the arithmetic."""
        device = pick_device(self.options.device)
        dtype = str(pick_dtype(self.options.dtype, device))
        packages = [f"{name} {version(name)}" for name in ("torch", "transformers")]
        return " ".join([folder_hash(self._folder, self.store), device.type, dtype, *packages])

    @cached_property
    def _local(self) -> LocalModel:
        device = pick_device(self.options.device)
        dtype = pick_dtype(self.options.dtype, device)
        opened = load(self.name, device=device, dtype=dtype, trust_remote_code=self.trusted)
        return LocalModel(opened.model, opened.tokenizer, name=self.name, max_tokens=self.options.max_tokens)

    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return self._local.loaded()

    def answers(self, ask: Ask, records: Any, manner: Manner, tick: Tick) -> list[Any]:
        """See `Respondent`."""
        return self._local.answers(ask, records, manner, tick)
