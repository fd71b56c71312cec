"""The models that `prunetune bench` measures: runs, checkpoints, hub names, .gguf files, and their dense models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunetune.bench.options import BenchOptions
from prunetune.errors import ConfigError
from prunetune.evaluation.suites.open_model import check_gguf_file, list_run_sizes, read_run_config, resolve_checkpoint
from prunetune.model.loading import load_config, resolve_model_path
from prunetune.model.provenance import read_history
from prunetune.utils.files import expand_path
from prunetune.utils.optional import import_optional


@dataclass(frozen=True)
class ModelSpec:
    """A model that is named but not opened yet."""

    label: str  # in tables and errors
    source: str  # a folder, a hub name, or a .gguf file for llama.cpp
    llama_cpp: bool = False
    trust_remote_code: bool = False  # whether code that comes with it is run


def resolve_models(models: Sequence[str], options: BenchOptions) -> tuple[ModelSpec, ...]:
    """Every model once; dense models of runs come first, so that all others are compared with one.

    Of a run with several sizes, all are measured. Raises a `PrunetuneError` if a name is unknown, a package is missing,
    or the prompt does not fit.
    """
    names: list[str] = []
    dense: list[ModelSpec] = []
    for name in models:
        run = read_run_config(path := expand_path(name))
        sizes = list_run_sizes(path) if run is not None else ()
        names += map(str, sizes or (name,))
    named = [_resolve_model(name, options) for name in names]
    for name in names if options.dense else ():
        # A .gguf file is opened as the run did, dequantised in transformers.
        if (run := read_run_config(expand_path(name))) is not None:
            label = f"{run.model} ({'before the run' if read_history(run.model) else 'dense'})"
            source = resolve_model_path(run.model)
            dense.append(ModelSpec(label, source, trust_remote_code=options.trust_remote_code))
    unique = tuple({spec.source: spec for spec in [*dense, *named]}.values())
    for spec in unique:
        _check_context(spec, options)
    return unique


def _resolve_model(name: str, options: BenchOptions) -> ModelSpec:
    path = expand_path(name)
    if path.suffix == ".gguf":
        import_optional("xllamacpp", extra="llamacpp", use=f"model {check_gguf_file(path)}")
        return ModelSpec(str(path), str(path), llama_cpp=True)
    source = resolve_model_path(resolve_checkpoint(name))
    return ModelSpec(name, source, trust_remote_code=options.trust_remote_code)


def _check_context(model: ModelSpec, options: BenchOptions) -> None:
    """Raises `ConfigError` if prompt and answer are longer than the model's context."""
    if model.llama_cpp:
        from prunetune.bench.llamacpp import gguf_context_length

        context = gguf_context_length(Path(model.source))
    else:
        context = context_length(model.source, trust_remote_code=model.trust_remote_code)
    wanted = options.prompt + options.generate
    if context and wanted > context:
        raise ConfigError(
            f"model {model.label}: --prompt {options.prompt} and --generate {options.generate} make {wanted} tokens, "
            f"its context has {context}; lower one of them"
        )


def context_length(source: str, *, trust_remote_code: bool) -> int:
    """Positions of a transformers model by its configuration; 0 if it does not say."""
    config = load_config(source, trust_remote_code=trust_remote_code).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0)
