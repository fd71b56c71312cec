"""Tune and structurally prune a language model for one domain, in one run."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunetune.config.recipe import RunConfig
from prunetune.plan import Plan

if TYPE_CHECKING:
    from prunetune.bench.measure_models import measure_models
    from prunetune.evaluation.results import Evaluation
    from prunetune.evaluation.suites.check import CheckResult
    from prunetune.evaluation.suites.options import CheckOptions, EvalOptions
    from prunetune.evaluation.suites.run import SuiteProgressCallback, evaluate_suite
    from prunetune.evaluation.suites.scorers import Permission
    from prunetune.evaluation.suites.suite import Suite
    from prunetune.export.formats import export_run
    from prunetune.pipeline.prepare import Console
    from prunetune.pipeline.push import push_run
    from prunetune.pipeline.result import RunResult
    from prunetune.pruning.cut import cut
    from prunetune.pruning.masking import masked
    from prunetune.pruning.sites import find_sites
    from prunetune.report import write_report

__all__ = [
    "Plan",
    "RunConfig",
    "RunResult",
    "check",
    "cut",
    "evaluate",
    "evaluate_suite",
    "export_run",
    "find_sites",
    "load_suite",
    "masked",
    "measure_models",
    "push_run",
    "run",
    "write_report",
]

# `import prunetune` must not import torch: functions import it when called, the names here when first used.
_LAZY_NAMES = {
    "RunResult": "prunetune.pipeline.result",
    "cut": "prunetune.pruning.cut",
    "evaluate_suite": "prunetune.evaluation.suites.run",
    "export_run": "prunetune.export.formats",
    "find_sites": "prunetune.pruning.sites",
    "masked": "prunetune.pruning.masking",
    "measure_models": "prunetune.bench.measure_models",
    "push_run": "prunetune.pipeline.push",
    "write_report": "prunetune.report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY_NAMES:
        raise AttributeError(f"module 'prunetune' has no attribute {name!r}")
    return getattr(import_module(_LAZY_NAMES[name]), name)


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> RunResult:
    """Tune, prune, cut, check, evaluate and report, one size or several; returns the run folder, with what it holds.

    With `resume`, continue the run in `config.out`, or start it if there is none. `console` shows progress (default: a
    terminal's or a notebook's), `command` is recorded as what started the run. Raises a `PrunetuneError` for what the
    user can fix, before anything is written where possible, and `LimitBroken` if the result is outside a limit.
    """
    from prunetune.pipeline.result import RunResult
    from prunetune.pipeline.run import run as run_pipeline
    from prunetune.utils.notebook import NotebookConsole, is_notebook

    console = console or (NotebookConsole() if is_notebook() else None)
    return RunResult(run_pipeline(config, resume=resume, console=console, command=command))


def load_suite(path: Path | str, *, strict: bool = True, root: Path | str | None = None) -> Suite:
    """Read and check a suite file; `root` overrides the folder that its sources start from. Raises `ConfigError`.

    With `strict` off, a task that cannot be run keeps its error, and the other tasks can still be run.
    """
    from prunetune.evaluation.suites.suite import load_suite as load

    return load(path, strict=strict, root=root)


def evaluate(
    model: str,
    suite: Suite | Path | str,
    *,
    options: EvalOptions | None = None,
    allow: Collection[Permission] = frozenset(),
    progress: SuiteProgressCallback | None = None,
) -> Evaluation:
    """The suite's scores of a run, checkpoint, hub name, .gguf file or endpoint; saved results are returned unchanged.

    A task that fails has its `error` instead of scores. Raises a `PrunetuneError` if the model cannot be opened.
    """
    from prunetune.evaluation.suites import evaluate_and_check

    return evaluate_and_check.evaluate(
        model, suite, options=options or evaluate_and_check.DEFAULTS, allow=allow, progress=progress
    )


def check(
    model: str,
    suite: Suite | Path | str,
    against: str = "",
    *,
    options: CheckOptions | None = None,
    allow: Collection[Permission] = frozenset(),
    progress: SuiteProgressCallback | None = None,
) -> CheckResult:
    """Compare a model with the suite's limits and with another model; for a run, by default its dense model."""
    from prunetune.evaluation.suites import evaluate_and_check

    return evaluate_and_check.check(
        model, suite, against, options=options or evaluate_and_check.DEFAULTS, allow=allow, progress=progress
    )
