"""`prunetune eval` and `prunetune check` as Python functions."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites.cache import CachedBackend
from prunetune.evaluation.suites.check import CheckResult, check_limits
from prunetune.evaluation.suites.http_client import public_url
from prunetune.evaluation.suites.open_model import (
    check_can_open,
    open_backend,
    reference_of_run,
    with_redaction_of_runs,
)
from prunetune.evaluation.suites.options import CheckOptions, EvalOptions
from prunetune.evaluation.suites.run import NO_PERMISSIONS, SuiteProgressCallback, evaluate_suite
from prunetune.evaluation.suites.score_history import record_scores
from prunetune.evaluation.suites.scorers import Permission
from prunetune.evaluation.suites.suite import Suite

DEFAULTS = CheckOptions()


def evaluate(
    model: str,
    suite: Suite | Path | str,
    *,
    options: EvalOptions = DEFAULTS,
    allow: Collection[Permission] = NO_PERMISSIONS,
    progress: SuiteProgressCallback | None = None,
) -> Evaluation:
    """Score a run, checkpoint, hub name, .gguf file or endpoint on a suite; results of `eval` are returned as they are.

    `allow` adds to the permissions in `options`. A task that fails has its `error` instead of scores. Raises a
    `PrunetuneError` where the model cannot be opened.
    """
    options = with_redaction_of_runs(options, model)
    return _evaluate(model, options.open_suite(suite), options, allow, progress).redacted(options.redaction)


def _evaluate(
    model: str,
    suite: Suite,
    options: EvalOptions,
    allow: Collection[Permission],
    progress: SuiteProgressCallback | None,
) -> Evaluation:
    """The evaluation with all texts: paired tests of a check may need them."""
    backend = open_backend(model, options)
    if isinstance(backend, Evaluation):
        return backend
    allow = {*allow, *options.permissions}
    evaluation = evaluate_suite(backend, suite, allow=allow, progress=progress, redaction=options.redaction)
    # Without a cache the files of a model, which may be large, are read for nothing else than its version.
    version = backend.fingerprint if isinstance(backend, CachedBackend) else ""
    record_scores(evaluation, suite.source, public_url(model), version)
    return evaluation


def check(
    model: str,
    suite: Suite | Path | str,
    against: str = "",
    *,
    options: CheckOptions = DEFAULTS,
    allow: Collection[Permission] = NO_PERMISSIONS,
    progress: SuiteProgressCallback | None = None,
) -> CheckResult:
    """Check a model against the suite's limits and a reference model.

    The reference is `against`, else `options.against`, else a run's dense tuned model, else its untuned one. Raises a
    `PrunetuneError`.
    """
    suite = options.open_suite(suite)
    against, what = against or options.against, ""
    if not against:
        against, what = reference_of_run(model)
    resolved = with_redaction_of_runs(options, model, against)
    check_can_open(against, options)  # before the model is scored for nothing
    scores, reference = (_evaluate(name, suite, resolved, allow, progress) for name in (model, against))
    name = f"{what} ({public_url(against)})" if what else public_url(against)
    return replace(check_limits(scores, reference, suite, resolved.redaction), reference=name)


def evaluation_to_json(evaluation: Evaluation, model: str, suite: str) -> str:
    """The evaluation with the names of model and suite, as JSON that `Evaluation.from_json` reads."""
    names = {"model": public_url(model), "suite": suite}
    return json.dumps({**json.loads(evaluation.to_json()), **names}, ensure_ascii=False) + "\n"
