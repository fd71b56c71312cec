"""What `prunetune bench` is given: runs, checkpoints, hub names, .gguf files; and the dense models they began with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunetune.bench.options import BenchOptions
from prunetune.errors import ConfigError
from prunetune.evaluation.suites.open_model import checkpoint_of, gguf_at, run_config, sizes_in
from prunetune.model.loading import load_config, locate
from prunetune.utils.optional import require


@dataclass(frozen=True)
class Named:
    """A model by its name, not opened."""

    label: str  # as the user would call it
    source: str  # a folder, a hub name, or a .gguf file for llama.cpp
    llama_cpp: bool = False
    trust: bool = False  # run code that comes with it


def named(models: Sequence[str], options: BenchOptions) -> tuple[Named, ...]:
    """Every model once; a run's dense model stands first, so that it is what all are compared with.

    Raises a `PrunetuneError` where a name leads nowhere, a package is missing, or the prompt does not fit.
    """
    models = [each for name in models for each in _sizes(name)]
    given = [_one(name, options) for name in models]
    dense = list(_dense(models, options)) if options.dense else []
    found = tuple({one.source: one for one in [*dense, *given]}.values())
    for one in found:
        _fits(one, options)
    return found


def _sizes(name: str) -> list[str]:
    """All sizes of a run of several; else what is named."""
    run = Path(name).expanduser()
    return list(map(str, sizes_in(run))) if run_config(run) is not None and sizes_in(run) else [name]


def _one(name: str, options: BenchOptions) -> Named:
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        require("xllamacpp", extra="llamacpp", use=f"model {gguf_at(path)}")
        return Named(str(path), str(path), llama_cpp=True)
    source, trust = checkpoint_of(name, trust_remote_code=options.trust_remote_code)
    return Named(name, locate(source), trust=trust)


def _dense(models: Sequence[str], options: BenchOptions) -> Iterator[Named]:
    """The models that runs began with; a .gguf file among them is opened as the run did, dequantised."""
    for name in models:
        run = run_config(Path(name).expanduser())
        if run is not None:
            yield Named(f"{run.model} (dense)", locate(run.model), trust=options.trust_remote_code)


def _fits(model: Named, options: BenchOptions) -> None:
    context, wanted = _positions(model), options.prompt + options.generate
    if context and wanted > context:
        raise ConfigError(
            f"model {model.label}: --prompt {options.prompt} and --generate {options.generate} make {wanted} tokens, "
            f"its context has {context}; lower one of them"
        )


def _positions(model: Named) -> int:
    if model.llama_cpp:
        from prunetune.bench.llamacpp import context_of as gguf_context

        return gguf_context(Path(model.source))
    return context_of(model.source, trust_remote_code=model.trust)


def context_of(source: str, *, trust_remote_code: bool) -> int:
    """Positions that a model for transformers knows; 0 where it says none."""
    config = load_config(source, trust_remote_code=trust_remote_code).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0)
