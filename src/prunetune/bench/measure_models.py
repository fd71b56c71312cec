"""`prunetune bench` as a function: latency, throughput and memory of several models."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from prunetune.bench.interleaved import run_interleaved
from prunetune.bench.models import ModelSpec, resolve_models
from prunetune.bench.options import BenchOptions
from prunetune.bench.result import BenchResult, summarise_bench
from prunetune.bench.runner_protocol import Runner
from prunetune.bench.worker import RunnerFactory, Worker, open_runner
from prunetune.errors import ConfigError
from prunetune.model.loading import pick_device
from prunetune.utils import environment

log = logging.getLogger(__name__)
DEFAULTS = BenchOptions()


def measure_models(
    models: Sequence[str], options: BenchOptions = DEFAULTS, *, opener: RunnerFactory = open_runner
) -> BenchResult:
    """Measure runs, checkpoints, hub names and .gguf files in interleaved runs, each model in a process of its own.

    All models are open at once. Raises a `PrunetuneError` before anything is opened if a name is unknown or the prompt
    does not fit.
    """
    if not models:
        raise ConfigError("bench needs a model: name a run, a model folder, a hub name or a .gguf file")
    batches = options.batches
    pick_device(options.device)  # raises before any process is started
    specs = resolve_models(models, options)
    with ExitStack() as stack:
        workers = []
        for spec in specs:
            worker = Worker(spec, options, opener)
            stack.callback(worker.close)
            workers.append(worker)
            log.info("opened %s in %.1f s", spec.label, worker.facts().load_s)
        return _measure(specs, workers, batches, options)


def measure_in_process(
    models: Sequence[str], options: BenchOptions = DEFAULTS, *, opener: RunnerFactory = open_runner
) -> BenchResult:
    """`measure_models` in this process; peak memory is left out, since it would be that of all models together."""
    batches, specs = options.batches, resolve_models(models, options)
    return _measure(specs, [opener(spec, options) for spec in specs], batches, options, with_peak=False)


def _measure(
    specs: Sequence[ModelSpec],
    runners: Sequence[Runner],
    batches: Sequence[int],
    options: BenchOptions,
    *,
    with_peak: bool = True,
) -> BenchResult:
    measured = run_interleaved(runners, batches, options.runs)
    for cell in (cell for cells in measured for cell in cells if not with_peak):
        cell.samples = [replace(sample, peak_bytes=None) for sample in cell.samples]
    labels, facts = [spec.label for spec in specs], [runner.facts() for runner in runners]
    return summarise_bench(labels, facts, measured, options=options, versions=environment.package_versions())
