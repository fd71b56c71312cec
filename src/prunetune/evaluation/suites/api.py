"""`prunetune eval` and `prunetune check` as Python functions."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from prunetune.errors import ConfigError
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites.check import CheckResult, check_limits
from prunetune.evaluation.suites.open_model import BackendOptions, check_can_open, dense_model_of_run, open_backend
from prunetune.evaluation.suites.run import NO_PERMISSIONS, SuiteProgressCallback, evaluate_suite
from prunetune.evaluation.suites.scorers import Permission
from prunetune.evaluation.suites.suite import Suite, load_suite

DEFAULTS = BackendOptions()


def evaluate(
    model: str,
    suite: Suite | Path | str,
    *,
    options: BackendOptions = DEFAULTS,
    allow: Collection[Permission] = NO_PERMISSIONS,
    progress: SuiteProgressCallback | None = None,
) -> Evaluation:
    """The suite's scores of a run, checkpoint, hub name, .gguf file or endpoint; saved results are returned unchanged.

    A task that fails has its `error` instead of scores. Raises a `PrunetuneError` where the model cannot be opened.
    """
    suite = suite if isinstance(suite, Suite) else load_suite(suite, strict=False)
    target = open_backend(model, options)
    return target if isinstance(target, Evaluation) else evaluate_suite(target, suite, allow=allow, progress=progress)


def check(
    model: str,
    suite: Suite | Path | str,
    against: str = "",
    *,
    options: BackendOptions = DEFAULTS,
    allow: Collection[Permission] = NO_PERMISSIONS,
    progress: SuiteProgressCallback | None = None,
) -> CheckResult:
    """Check a model against the suite's limits and a reference model; for a run, its dense model by default."""
    suite = suite if isinstance(suite, Suite) else load_suite(suite, strict=False)
    against = against or dense_model_of_run(model)
    check_can_open(against, options)  # before the model is scored for nothing
    scores = evaluate(model, suite, options=options, allow=allow, progress=progress)
    reference = evaluate(against, suite, options=options, allow=allow, progress=progress)
    return check_limits(scores, reference, suite)


def evaluation_to_json(evaluation: Evaluation, model: str, suite: str) -> str:
    """The evaluation with the names of model and suite, as JSON that `Evaluation.from_json` reads."""
    return json.dumps({**json.loads(evaluation.to_json()), "model": model, "suite": suite}, ensure_ascii=False) + "\n"


def check_writable(path: Path | None, flag: str) -> None:
    """Raise `ConfigError` for a file that cannot be written, before anything is computed."""
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{flag} {path}: name a file in a folder that exists")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: its folder cannot be written to; name a file in another one")
