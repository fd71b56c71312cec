"""What an exporter is told, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the formats can be told; each refuses what means nothing to it."""

    dtype: str = ""  # of the weights: f32, f16, bf16, q8_0, ...; "": the format's own choice
    pad: bool = False  # uniform: fill narrower layers up with zeros
    quantize: str = ""  # int8, int4: of uniform and per-layer folders


@dataclass(frozen=True)
class RuntimeCheck:
    """What was found when the written thing was opened again; a check that finds a difference raises instead."""

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

    def __str__(self) -> str:
        """Lines for the command line."""
        lines = [f"{self.format}, {self.dtype}: {self.params / 1e6:,.1f} M parameters, {self.bytes / 1e6:,.1f} MB"]
        for check in self.checks:
            lines.append(f"{'checked' if check.ran else 'not run'} in {check.runtime}: {check.detail}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), str(self.path)])
