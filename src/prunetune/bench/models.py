"""What `prunetune bench` is given: runs, checkpoints, hub names, .gguf files; and the dense models they began with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunetune.bench.options import BenchOptions
from prunetune.errors import ConfigError
from prunetune.evaluation.suites.open_model import check_gguf_file, list_run_sizes, read_run_config, resolve_checkpoint
from prunetune.model.loading import load_config, resolve_model_path
from prunetune.utils.optional import import_optional


@dataclass(frozen=True)
class ModelSpec:
    """A model by its name, not opened."""

    label: str  # as the user would call it
    source: str  # a folder, a hub name, or a .gguf file for llama.cpp
    llama_cpp: bool = False
    trust_remote_code: bool = False  # run code that comes with it


def resolve_models(models: Sequence[str], options: BenchOptions) -> tuple[ModelSpec, ...]:
    """Every model once; a run's dense model stands first, so that it is what all are compared with.

    Raises a `PrunetuneError` where a name leads nowhere, a package is missing, or the prompt does not fit.
    """
    models = [each for name in models for each in _sizes(name)]
    given = [_resolve_model(name, options) for name in models]
    dense = list(_dense(models, options)) if options.dense else []
    found = tuple({one.source: one for one in [*dense, *given]}.values())
    for one in found:
        _check_context(one, options)
    return found


def _sizes(name: str) -> list[str]:
    """All sizes of a run of several; else what is named."""
    run = Path(name).expanduser()
    return list(map(str, list_run_sizes(run))) if read_run_config(run) is not None and list_run_sizes(run) else [name]


def _resolve_model(name: str, options: BenchOptions) -> ModelSpec:
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        import_optional("xllamacpp", extra="llamacpp", use=f"model {check_gguf_file(path)}")
        return ModelSpec(str(path), str(path), llama_cpp=True)
    source, trust = resolve_checkpoint(name, trust_remote_code=options.trust_remote_code)
    return ModelSpec(name, resolve_model_path(source), trust_remote_code=trust)


def _dense(models: Sequence[str], options: BenchOptions) -> Iterator[ModelSpec]:
    """The models that runs began with; a .gguf file among them is opened as the run did, dequantised."""
    for name in models:
        run = read_run_config(Path(name).expanduser())
        if run is not None:
            yield ModelSpec(
                f"{run.model} (dense)", resolve_model_path(run.model), trust_remote_code=options.trust_remote_code
            )


def _check_context(model: ModelSpec, options: BenchOptions) -> None:
    context, wanted = _positions(model), options.prompt + options.generate
    if context and wanted > context:
        raise ConfigError(
            f"model {model.label}: --prompt {options.prompt} and --generate {options.generate} make {wanted} tokens, "
            f"its context has {context}; lower one of them"
        )


def _positions(model: ModelSpec) -> int:
    if model.llama_cpp:
        from prunetune.bench.llamacpp import gguf_context_length as gguf_context

        return gguf_context(Path(model.source))
    return context_length(model.source, trust_remote_code=model.trust_remote_code)


def context_length(source: str, *, trust_remote_code: bool) -> int:
    """Positions that a model for transformers knows; 0 where it says none."""
    config = load_config(source, trust_remote_code=trust_remote_code).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0)
