"""The options of an export, and its result: the path, format, size and checks."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of all formats; a format refuses those that do not apply to it."""

    dtype: str = ""  # of the weights: f32, f16, bf16, q8_0, ...; "": the format's default
    pad: bool = False  # uniform: pad narrower layers with zeros
    quantize: str = ""  # uniform, per-layer: int8 or int4
    imatrix_tokens: int = 8192  # gguf, types that llama.cpp mixes: tokens of the run's data to weigh columns by


@dataclass(frozen=True)
class RuntimeCheck:
    """A check that passed, or could not run, in one runtime; a check that fails raises `SelfCheckFailed` instead."""

    runtime: str  # "transformers 5.23.0"
    detail: str  # "logits within 2.1e-06", or why it did not run
    ran: bool = True


@dataclass(frozen=True)
class ExportResult:
    """A written and checked export."""

    path: Path
    format: str  # "gguf: arch deci", "MistralForCausalLM"
    dtype: str
    params: int
    bytes: int
    checks: tuple[RuntimeCheck, ...]
    notes: tuple[str, ...] = ()  # "written as MistralForCausalLM because ..."
    commands: tuple[str, ...] = ()  # that open it in other programs

    def __str__(self) -> str:
        """The lines that the command prints."""
        lines = [f"{self.format}, {self.dtype}: {self.params / 1e6:,.1f} M parameters, {self.bytes / 1e6:,.1f} MB"]
        for check in self.checks:
            lines.append(f"{'checked' if check.ran else 'not run'} in {check.runtime}: {check.detail}")
        lines += [f"note: {note}" for note in self.notes] + [f"run: {command}" for command in self.commands]
        return "\n".join([*lines, str(self.path)])
