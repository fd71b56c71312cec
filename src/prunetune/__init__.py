"""Tune and structurally prune a language model for one domain, in one run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunetune.bench.api import measure_models
    from prunetune.config.recipe import RunConfig
    from prunetune.evaluation.suites.api import check, evaluate
    from prunetune.evaluation.suites.run import evaluate_suite
    from prunetune.evaluation.suites.suite import load_suite
    from prunetune.export.formats import export_run
    from prunetune.pipeline.multi_size import run
    from prunetune.plan import Plan
    from prunetune.pruning.cut import cut
    from prunetune.pruning.masking import masked
    from prunetune.pruning.sites import find_sites
    from prunetune.report import write_report

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
    "RunConfig": "prunetune.config.recipe",
    "check": "prunetune.evaluation.suites.api",
    "cut": "prunetune.pruning.cut",
    "evaluate": "prunetune.evaluation.suites.api",
    "evaluate_suite": "prunetune.evaluation.suites.run",
    "export_run": "prunetune.export.formats",
    "find_sites": "prunetune.pruning.sites",
    "load_suite": "prunetune.evaluation.suites.suite",
    "masked": "prunetune.pruning.masking",
    "measure_models": "prunetune.bench.api",
    "run": "prunetune.pipeline.multi_size",
    "write_report": "prunetune.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunetune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
