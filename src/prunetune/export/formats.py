"""The export formats (uniform, per-layer, gguf, onnx, mlx) in a table; `export_run` writes and checks one."""

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prunetune.errors import ConfigError
from prunetune.export import convert
from prunetune.export.gguf import write as gguf
from prunetune.export.gguf.modelfile import format_modelfile, run_commands
from prunetune.export.gguf.tensors import MIXES
from prunetune.export.mlx import export_mlx
from prunetune.export.model_card import format_export_card
from prunetune.export.onnx import export_onnx
from prunetune.export.quantize import SCHEMES, export_quantized
from prunetune.export.result import ExportOptions, ExportResult
from prunetune.export.source import ExportSource
from prunetune.model.checksums import write_checksums
from prunetune.model.config_checks import is_multimodal
from prunetune.model.provenance import HISTORY_FILE
from prunetune.utils.files import PARTIAL, expand_path, explain_write_errors, require_disk_space, write_text

# Writes to a path that does not exist yet, and checks what it wrote (raises `SelfCheckFailed`). Raises another
# `PrunetuneError`, before anything is written, for a model or options that the format cannot have.
Exporter = Callable[[ExportSource, Path, ExportOptions], ExportResult]


@dataclass(frozen=True)
class ExportFormat:
    """One export format."""

    write: Exporter
    dtypes: tuple[str, ...]  # the first is the default; "": as stored
    suffix: str = ""  # of the file; "": the format is a folder


EXPORT_FORMATS: Mapping[str, ExportFormat] = {
    "uniform": ExportFormat(convert.export_uniform, ("", "f32", "bf16", "f16")),
    "per-layer": ExportFormat(convert.export_per_layer, ("", "f32", "bf16", "f16")),
    "gguf": ExportFormat(gguf.export_gguf, gguf.DTYPES, ".gguf"),
    "onnx": ExportFormat(export_onnx, ("f32",)),
    "mlx": ExportFormat(export_mlx, ("", "f32", "bf16", "f16")),
}


def export_run(
    path: Path,
    to: str = "",
    *,
    out: Path | None = None,
    options: ExportOptions | None = None,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Write a run's model (`path`: a run folder, or its model folder) in another format, and check the result.

    `to`: one of `EXPORT_FORMATS`; "" keeps the model's layout.
    `out`: the path to write; by default in the run folder's exports/, or next to a model folder.
    Nothing is overwritten, and `out` exists only after the check has passed. Raises a `PrunetuneError`.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # the command prints lines of its own
    options = options or ExportOptions()
    if to and to not in EXPORT_FORMATS:
        raise ConfigError(f"format {to!r} is not known; known are {', '.join(EXPORT_FORMATS)}")
    source = ExportSource.open(path, trust_remote_code=trust_remote_code)
    to = to or source.layout
    options = replace(options, dtype=options.dtype or EXPORT_FORMATS[to].dtypes[0])
    _check_options(to, source, options)
    name = "-".join(filter(None, (to, options.quantize or options.dtype))) + EXPORT_FORMATS[to].suffix
    exports = source.run / "exports" / name if source.run else source.folder.with_name(f"{source.name}-{name}")
    path = expand_path(out) if out else exports
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists already: name another path with --out, or remove it")
    require_disk_space(path.parent, source.params * convert.DTYPES.get(options.dtype, source.dtype).itemsize)
    partial = path.with_name(path.name + PARTIAL)
    with explain_write_errors(path):
        _remove(partial)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if options.quantize:
                result = export_quantized(source, partial, options.quantize)
            else:
                result = EXPORT_FORMATS[to].write(source, partial, options)
            if partial.is_dir():
                if (card := source.folder / "README.md").is_file():
                    description = f"{to}, {result.dtype}, {result.bytes / 1e6:,.1f} MB"
                    text = format_export_card(card.read_text(encoding="utf-8"), to, description)
                    write_text(partial / card.name, text)
                if (source.folder / HISTORY_FILE).is_file():
                    shutil.copyfile(source.folder / HISTORY_FILE, partial / HISTORY_FILE)
                write_checksums(partial)
            partial.rename(path)
        finally:
            _remove(partial)
        if to != "gguf":
            commands = (f"mlx_lm.chat --model {shlex.quote(str(path))}",) if to == "mlx" else ()
            return replace(result, path=path, commands=commands)
        # Beside the file, what Ollama needs to know of it.
        modelfile = path.with_suffix(".Modelfile")
        text, note = format_modelfile(source, path.name)
        if os.path.lexists(modelfile):
            note = f"{modelfile} exists already and was kept"
        else:
            write_text(modelfile, text)
        notes = (*result.notes, note) if note else result.notes
    return replace(result, path=path, notes=notes, commands=run_commands(path, modelfile))


def _check_options(to: str, source: ExportSource, options: ExportOptions) -> None:
    """Raises `ConfigError` for options that the format, or this model in it, cannot have."""
    if to in ("gguf", "onnx", "mlx") and is_multimodal(source.config):
        raise ConfigError(f"{to} of a multimodal model ({source.config.model_type}) is not written: use --to uniform")
    dtypes = EXPORT_FORMATS[to].dtypes
    if options.dtype not in dtypes:
        raise ConfigError(f"{to} takes no dtype {options.dtype!r}; use one of {', '.join(filter(None, dtypes))}")
    if options.pad and to != "uniform":
        raise ConfigError(f"--pad makes layers of one width, for --to uniform; {to} has no use for it: leave it out")
    if options.imatrix_tokens < 0:
        raise ConfigError(f"--imatrix-tokens {options.imatrix_tokens} is below 0: use 0 for no importance matrix")
    if options.imatrix_tokens not in (0, ExportOptions.imatrix_tokens) and options.dtype not in MIXES:
        raise ConfigError(f"--imatrix-tokens is for gguf in {', '.join(MIXES)}: name one by --dtype, or leave it out")
    if not options.quantize:
        return
    if options.quantize not in SCHEMES:
        raise ConfigError(f"quantize {options.quantize!r} is not known; known are {', '.join(SCHEMES)}")
    if to == "gguf":
        raise ConfigError("gguf has quantised types of its own: leave out --quantize and say --dtype q8_0")
    if to != source.layout or options.pad or options.dtype:
        raise ConfigError(
            f"--quantize keeps the layout ({source.layout}) and has types of its own: leave out --to, --dtype and --pad"
        )


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
