"""Tune and structurally prune a language model for one domain, in one run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunetune.bench.verb import measure_models
    from prunetune.config import RunConfig
    from prunetune.export.formats import export_run
    from prunetune.model.masking import masked
    from prunetune.model.sites import find_sites
    from prunetune.model.surgery import cut
    from prunetune.plan import Plan
    from prunetune.report import write_report
    from prunetune.sizes import run
    from prunetune.suites.run import evaluate_suite
    from prunetune.suites.suite import load_suite
    from prunetune.suites.verbs import check, evaluate

__all__ = [
    "Plan",
    "RunConfig",
    "check",
    "cut",
    "evaluate",
    "evaluate_suite",
    "export_run",
    "find_sites",
    "load_suite",
    "masked",
    "measure_models",
    "run",
    "write_report",
]

# Resolved on first use: `prunetune --help` must not wait for torch.
_HOMES = {
    "Plan": "prunetune.plan",
    "RunConfig": "prunetune.config",
    "check": "prunetune.suites.verbs",
    "cut": "prunetune.model.surgery",
    "evaluate": "prunetune.suites.verbs",
    "evaluate_suite": "prunetune.suites.run",
    "export_run": "prunetune.export.formats",
    "find_sites": "prunetune.model.sites",
    "load_suite": "prunetune.suites.suite",
    "masked": "prunetune.model.masking",
    "measure_models": "prunetune.bench.verb",
    "run": "prunetune.sizes",
    "write_report": "prunetune.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
