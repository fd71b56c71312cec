"""Open the model of `eval` and `check`: a run, checkpoint, hub name, .gguf file, endpoint, or saved results."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prunetune.config.recipe import RunConfig, load_saved_recipe
from prunetune.errors import ConfigError, DataError, ModelError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites.cache import AnswerStore, CachedBackend, files_hash, folder_hash
from prunetune.evaluation.suites.endpoint import Endpoint
from prunetune.evaluation.suites.http_client import EndpointClient, public_url
from prunetune.evaluation.suites.llamacpp import LlamaCpp
from prunetune.evaluation.suites.local import LocalModel
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.evaluation.suites.protocol import Backend, GenerationSettings, OnRequestsDone, RequestKind
from prunetune.manifest import Manifest
from prunetune.model.loading import (
    load_config,
    load_model_and_tokenizer,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve_model_path,
)
from prunetune.model.provenance import ModelIdentity
from prunetune.model.reduced_vocabulary import reduced_model_of
from prunetune.utils.files import expand_path
from prunetune.utils.optional import require_installed
from prunetune.utils.untrusted import read_text

log = logging.getLogger(__name__)


def open_backend(name: str, options: EvalOptions, store: AnswerStore | None = None) -> Backend | Evaluation:
    """Whatever the name stands for; weights are read when a question needs them. Raises a `PrunetuneError`."""
    if "://" in name:
        return Endpoint(EndpointClient(name, key_env=options.key_env, timeout=options.timeout), options.model_name)
    path = expand_path(name)
    if path.suffix == ".json":
        try:
            return Evaluation.from_json(read_text(path))
        except (OSError, ValueError, DataError) as broken:
            raise DataError(
                f"{path}: cannot be read ({broken}); name a file that prunetune eval --out wrote"
            ) from broken
    store = store or AnswerStore()
    pick_device(options.device)  # raises before anything is read
    backend: Backend
    if path.suffix == ".gguf":
        check_gguf_file(path)
        require_installed("xllamacpp", extra="llamacpp", use=f"model {path}")
        fingerprint = f"llama.cpp {files_hash([path], store)} xllamacpp {version('xllamacpp')}"
        backend = LlamaCpp(path, fingerprint, timeout=max(options.timeout, 600.0))
    else:
        backend = CheckpointBackend(resolve_checkpoint(name), options, store)
    return CachedBackend(backend, store, options.redaction) if options.cache else backend


def with_redaction_of_runs(options: EvalOptions, *names: str) -> EvalOptions:
    """The options, with rows hidden and redacted also as the recipes say of runs named, and of runs of models named."""
    runs = [run for name in names if "://" not in name and (run := _recipe_of_run_around(expand_path(name)))]
    reports = [options, *(run.report for run in runs)]
    is_off = any(report.samples == "off" for report in reports)
    patterns = dict.fromkeys(pattern for report in reports for pattern in report.redact)
    return replace(options, samples="off" if is_off else "on", redact=tuple(patterns))


def _recipe_of_run_around(path: Path) -> RunConfig | None:
    """The recipe of a run folder, or of the one that a model in it is of: RUN/model, RUN/tuned/adapter."""
    for folder in path.absolute().parents[:2] if read_run_config(path) is None else ():
        with suppress(ConfigError):  # another project's config.yaml
            if (folder / "manifest.json").is_file() and (config := read_run_config(folder)):
                return config
    return read_run_config(path)


def check_can_open(name: str, options: EvalOptions) -> None:
    """Raise now what opening a name would raise later, as far as is known before weights are read and servers asked."""
    target = open_backend(name, options)
    backend = target.backend if isinstance(target, CachedBackend) else target
    if isinstance(backend, CheckpointBackend):
        load_config(backend.name, trust_remote_code=options.trust_remote_code)
        load_tokenizer(backend.name, trust_remote_code=options.trust_remote_code)


def resolve_checkpoint(name: str) -> str:
    """The folder or hub name that a run or a name means; raises `ModelError`."""
    path = expand_path(name)
    if read_run_config(path) is None:
        resolve_model_path(name)  # raises before anything is read
        return name
    folder = path / "model"
    if not folder.is_dir() and list_run_sizes(path):
        raise ModelError(f"{path}: this run has several sizes; name one of {', '.join(map(str, list_run_sizes(path)))}")
    if not folder.is_dir():
        raise ModelError(f"{path}: this run has no model yet; resume it with prunetune run RECIPE --resume")
    return str(folder)


def check_gguf_file(path: Path) -> Path:
    """`path`, if it is a file; raises `ModelError` if not."""
    if not path.is_file():
        raise ModelError(f"model {path}: no such file; name a .gguf file, a model folder or a hub name")
    return path


def reference_of_run(name: str) -> tuple[str, str]:
    """A run's reference and what it is: the dense model tuned on the same data, or the untuned one where it has none.

    Raises `ModelError` for what is no run folder.
    """
    run = expand_path(name)
    config = read_run_config(run)
    with suppress(OSError, ValueError):  # without a manifest, what the base was is not known
        identity = Manifest.from_json(read_text(run / "manifest.json")).model.identity
        if config and identity and (changes := ModelIdentity(config.model).changes_since(identity)):
            raise ModelError(
                f"{name}: its dense model changed since ({changes}): put it back, or name one by --against"
            )
    for folder in (run, run.parent.parent) if config else ():  # the second for one of several sizes
        if (adapter := folder / "tuned" / "adapter").is_dir():
            return str(adapter), "the dense model, tuned on the run's data"
    return dense_model_of_run(name), "the untuned dense model: the run has no tuned one"


def dense_model_of_run(name: str) -> str:
    """The dense model of a run, as the run opened it (a .gguf file is dequantised); raises `ModelError`."""
    run = read_run_config(expand_path(name))
    if run is None:
        raise ModelError(
            f"{public_url(name)} is no run folder, which would know its dense model; name the reference with --against"
        )
    return resolve_model_path(str(reduced_model_of(expand_path(name)) or run.model))


def read_run_config(path: Path) -> RunConfig | None:
    """The recipe of a run folder; None for any other path."""
    recipe = path / "config.yaml"
    if not recipe.is_file() or (path / "config.json").exists():
        return None
    return load_saved_recipe(recipe)


def list_run_sizes(run: Path) -> list[Path]:
    """The folders of a run of several sizes that have a model, the largest first; each is a run folder itself."""
    folders = [folder for folder in (run / "sizes").glob("*") if (folder / "model").is_dir()]
    return sorted(folders, key=lambda folder: folder.name, reverse=True)  # named by share kept: "0.8", "0.65"


@dataclass(frozen=True)
class CheckpointBackend:
    """A model folder or hub name; its weights are read at the first request that is not cached."""

    name: str
    options: EvalOptions
    store: AnswerStore

    @cached_property
    def _folder(self) -> Path:
        """The folder of its files; those of a hub name are in one folder once they are downloaded."""
        path = Path(resolve_model_path(self.name))
        if path.is_dir():
            return path
        from transformers.utils import cached_file

        self.model_and_tokenizer()  # downloads the weights, which are hashed
        return Path(cached_file(self.name, "config.json")).parent

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, configuration and tokenizer, with device, precision and package versions."""
        device = pick_device(self.options.device)
        dtype = str(pick_dtype(self.options.dtype, device))
        packages = [f"{name} {version(name)}" for name in ("torch", "transformers")]
        return " ".join([folder_hash(self._folder, self.store), device.type, dtype, *packages])

    @cached_property
    def _local(self) -> LocalModel:
        device = pick_device(self.options.device)
        dtype = pick_dtype(self.options.dtype, device)
        log.info("loading %s", public_url(self.name))
        trust = self.options.trust_remote_code
        opened = load_model_and_tokenizer(self.name, device=device, dtype=dtype, trust_remote_code=trust)
        return LocalModel(opened.model, opened.tokenizer, name=self.name, max_tokens=self.options.max_tokens)

    def model_and_tokenizer(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return self._local.model_and_tokenizer()

    def run_requests(
        self, kind: RequestKind, records: Any, settings: GenerationSettings, tick: OnRequestsDone
    ) -> list[Any]:
        """See `Backend`."""
        return self._local.run_requests(kind, records, settings, tick)
