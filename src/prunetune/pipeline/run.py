"""One run, from recipe to report: prepare, train, finish, evaluate, measure, check the limits."""

from contextlib import closing
from pathlib import Path

from prunetune.config.recipe import RunConfig
from prunetune.model.loading import pick_device
from prunetune.pipeline.finish import finish
from prunetune.pipeline.monitor import make_monitor
from prunetune.pipeline.multi_size import run_sizes
from prunetune.pipeline.prepare import Console, prepare
from prunetune.pipeline.recording import raise_if_limits_broken, record_origin, run_lifecycle
from prunetune.pipeline.stages import evaluate_all, evaluate_drift, measure, release_other_ranks, train
from prunetune.runs.folder import create_run_folder
from prunetune.runs.trackers import require_trackers
from prunetune.train.parallel.ranks import init_distributed
from prunetune.utils.console import SilentConsole, make_console
from prunetune.utils.determinism import deterministic


def run(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> Path:
    """Tune, prune, cut, check, evaluate and report, one size or several; returns the run folder.

    Each stage leaves one thing on disk (checkpoints, model/, evaluation/*.json, report.html) and is skipped where that
    is complete, so a run that was stopped anywhere continues from there. All ranks of a launch train; rank 0 does the
    rest alone. Raises a `PrunetuneError` for what the user can fix, before anything is written where possible.
    """
    if config.budget.sizes:
        return run_sizes(config, resume=resume, console=console, command=command)
    require_trackers(config.report_to)
    ranks = init_distributed(pick_device(config.device))
    device = pick_device(config.device) if ranks.world_size == 1 else ranks.device
    console = console or (make_console(config.train.log_every) if ranks.is_main else SilentConsole())
    with closing(console), deterministic(config.deterministic, device):
        with ranks.main_process_first():
            context = prepare(config, resume=resume, console=console, ranks=ranks)
        monitor = make_monitor(context)
        ranks.barrier()  # until every rank has read the folder, which rank 0 then changes
        if not ranks.is_main:
            with ranks.barrier_before_failing():
                train(context, monitor)
                release_other_ranks(context)
            return context.folder.path
        create_run_folder(context.folder, context.recipe)
        with ranks.barrier_before_failing(), run_lifecycle(context, command):
            record_origin(context, command)
            context.write_reduced_model()
            train(context, monitor)
            context = release_other_ranks(context)
            finish(context, streamed=ranks.uses_fsdp)
            evaluate_all(context)
            evaluate_drift(context)
            measure(context)
            raise_if_limits_broken(context)
    return context.folder.path
