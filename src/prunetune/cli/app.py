"""The command line: a command opens, calls, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import logging
import os
import select
import shlex
import signal
import sys
import traceback
import typing
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from prunetune.bench.options import BenchOptions
from prunetune.cli.flags import flags_to_overrides, make_flags_class
from prunetune.config.fields import read_options
from prunetune.config.recipe import RunConfig, UnitName, WorkloadConfig, load_recipe
from prunetune.errors import DataError, LimitBroken, PrunetuneError
from prunetune.evaluation.suites.options import CheckOptions, EvalOptions
from prunetune.utils.failures import explain_failure, is_gpu_fault
from prunetune.utils.launch import (
    rank_and_world_size,
    rank_prefix,
    run_and_exit_on_failure,
    single_process_error,
)
from prunetune.utils.threads import limit_openmp_threads

app = App(
    name="prunetune",
    help="Tune and structurally prune a language model for one domain, in one run.",
    version_flags=["--version"],
    help_on_error=False,
    suppress_keyboard_interrupt=False,  # `_guarded` says how to go on
)
# Every option of a recipe as a flag, all optional: flags win over the recipe.
Flags: typing.TypeAlias = make_flags_class(RunConfig)  # type: ignore[valid-type]
EXIT_OUTPUT_CLOSED = 141  # exit code where nobody reads what is printed: a shell's for SIGPIPE
NO_FLAGS = Flags()
BenchFlags: typing.TypeAlias = make_flags_class(BenchOptions)  # type: ignore[valid-type]
NO_BENCH_FLAGS = BenchFlags()
EvalFlags: typing.TypeAlias = make_flags_class(EvalOptions)  # type: ignore[valid-type]
NO_EVAL_FLAGS = EvalFlags()
CheckFlags: typing.TypeAlias = make_flags_class(CheckOptions)  # type: ignore[valid-type]
NO_CHECK_FLAGS = CheckFlags()
WorkloadFlags: typing.TypeAlias = make_flags_class(WorkloadConfig)  # type: ignore[valid-type]
NO_WORKLOAD_FLAGS = WorkloadFlags()
DEFAULT_UNITS: tuple[UnitName, ...] = ("kv-groups", "mlp-channels")


@app.command
def run(
    recipe: Path,
    /,
    *,
    resume: Annotated[bool, Parameter(negative=(), help="Go on with a run that was stopped.")] = False,
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Check model, data and budgets, say what they would mean, and write nothing.")
    ] = False,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
) -> None:
    """Tune, prune, cut, check, evaluate and report, into a run folder.

    Parameters
    ----------
    recipe
        A YAML file of options; see recipes/.
    """
    config = load_recipe(recipe, flags_to_overrides(flags))
    if dry_run:
        from prunetune.cli.preview import render_dry_run

        print(render_dry_run(config, resume=resume))
        return
    _run(config, resume=resume)


@app.command
def demo(
    *,
    resume: Annotated[bool, Parameter(negative=(), help="Go on with a demo that was stopped.")] = False,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
) -> None:
    """The same on a real small model and clinical coding terms that come as packages; no GPU needed."""
    with resources.as_file(resources.files("prunetune") / "demo.yaml") as recipe:
        config = load_recipe(recipe, flags_to_overrides(flags))
    _run(config, resume=resume)


def _run(config: RunConfig, *, resume: bool) -> None:
    from prunetune.cli.output import render_run
    from prunetune.pipeline.multi_size import run as whole_run

    folder = whole_run(config, resume=resume, command=shlex.join(["prunetune", *sys.argv[1:]]))
    if not rank_and_world_size()[0]:
        print(render_run(folder))


@app.command
def compare(
    recipe: Path,
    /,
    *,
    resume: Annotated[
        bool, Parameter(negative=(), help="Go on with a comparison that was stopped, or grow it.")
    ] = False,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
) -> None:
    """Dense, two-stage and one-stage side by side: same data, steps and budget, over budgets, seeds, learning rates.

    Parameters
    ----------
    recipe
        A YAML file of options; its section `compare` says what is compared.
    """
    from prunetune.compare.run import compare as whole_comparison

    config = load_recipe(recipe, flags_to_overrides(flags))
    folder = whole_comparison(config, resume=resume, command=shlex.join(["prunetune", *sys.argv[1:]]))
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"page {folder / 'comparison.html'}")


@app.command
def sites(
    model: str,
    /,
    *,
    layout: Literal["per-layer", "uniform"] = "per-layer",
    align: Annotated[int, Parameter(help="MLP widths are multiples of this; 0: chosen by size.")] = 0,
    units: Annotated[
        tuple[UnitName, ...], Parameter(help="Kinds of unit, see budget.units.", negative=())
    ] = DEFAULT_UNITS,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps; times are of this one.")] = "auto",
    measure: Annotated[
        bool, Parameter(negative=(), help="Time this device for latency, where no table is kept yet.")
    ] = False,
    workload: Annotated[WorkloadFlags, Parameter(name="*")] = NO_WORKLOAD_FLAGS,
    trust_remote_code: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """What can go: sites, units, legal shapes, and what budgets would mean in bytes and time; reads only the config.

    Parameters
    ----------
    model
        A folder, a hub name, a .gguf file, or 'demo'.
    """
    from prunetune.cli.preview import render_sites

    asked = read_options(WorkloadConfig, flags_to_overrides(workload), where="sites")
    print(
        render_sites(
            model, layout=layout, align=align, units=units, trust_remote_code=trust_remote_code,
            workload=asked, device=device, measure=measure,
        )
    )  # fmt: skip


@app.command
def runs(
    folder: Path = Path("runs"),
    /,
    *,
    model: Annotated[str, Parameter(help="Only runs whose model contains this.")] = "",
    status: Annotated[str, Parameter(help="Only: done, running, interrupted, failed, 'gate failed' or gone.")] = "",
    where: Annotated[tuple[str, ...], Parameter(negative=(), help="Only where 'accuracy >= 0.7' holds, say.")] = (),
) -> None:
    """List the runs of a folder, the newest first, from its runs.sqlite (of $PRUNETUNE_HOME, where that is set).

    Parameters
    ----------
    place
        The folder that holds the run folders.
    """
    from prunetune.runs.history import list_runs
    from prunetune.runs.listing import filter_runs, render_runs_table

    print(render_runs_table(filter_runs(list_runs(folder), model=model, status=status, where=where)))


@app.command(name="compare-runs")
def compare_runs(first: Path, /, *others: Path) -> None:
    """Set finished runs beside the first: options, scores, units kept in both, and items that flipped."""
    from prunetune.runs.diff import diff_runs

    print(diff_runs([first, *others]))


@app.command
def watch(run: Path, /) -> None:
    """Look on while a run goes on, in a terminal; ends when it does."""
    from prunetune.runs.watch import watch_run

    watch_run(run)


@app.command
def report(run: Path, /) -> None:
    """Write a run's report.html again."""
    from prunetune.report import write_report

    print(write_report(run))


@app.command
def export(
    run: Path,
    /,
    *,
    to: Annotated[
        Literal["uniform", "per-layer", "gguf", "onnx"] | None, Parameter(help="Default: the layout it has.")
    ] = None,
    quantize: Annotated[
        Literal["int8", "int4"] | None, Parameter(help="Weight-only; opens with torchao, or bitsandbytes (int4).")
    ] = None,
    out: Annotated[Path | None, Parameter(help="Where; default: exports/ of the run folder.")] = None,
    dtype: Annotated[str, Parameter(help="f32, f16, bf16; gguf also q8_0, q4_k_m, ...; default: the format's.")] = "",
    pad: Annotated[
        bool, Parameter(negative=(), help="uniform: fill narrower layers up with zeros; costs what was saved.")
    ] = False,
    trust_remote_code: Annotated[bool, Parameter(negative=(), help="Run code of a model folder.")] = False,
) -> None:
    """Write a finished run's model in another format, open it again and compare.

    Parameters
    ----------
    run
        A run folder, or a model folder that prunetune wrote.
    """
    from prunetune.export.formats import export_run
    from prunetune.export.result import ExportOptions

    options = ExportOptions(dtype=dtype, pad=pad, quantize=quantize or "")
    print(export_run(run, to or "", out=out, options=options, trust_remote_code=trust_remote_code))


@app.command(name="eval")
def evaluate(
    model: str,
    /,
    *,
    suite: Path,
    out: Annotated[Path | None, Parameter(help="A JSON file for scores and items; check reads it too.")] = None,
    flags: Annotated[EvalFlags, Parameter(name="*")] = NO_EVAL_FLAGS,
) -> None:
    """The scores of a suite, of any model: each task with standard errors; what cannot be scored says why.

    Parameters
    ----------
    model
        A run, a model folder, a hub name, a .gguf file, or an OpenAI-compatible endpoint (http://host:port/v1).
    suite
        A YAML file of tasks; see suites/.
    """
    from prunetune.evaluation.suites import api, output
    from prunetune.utils.console import evaluation_progress
    from prunetune.utils.files import check_writable, write_text

    options = read_options(EvalOptions, flags_to_overrides(flags), where="eval")
    check_writable(out, "--out")
    with evaluation_progress() as progress:
        scores = api.evaluate(model, suite, options=options, progress=progress)
    if out is not None:
        write_text(out, api.evaluation_to_json(scores, model, str(suite)))
    print(output.render_evaluation(scores))
    unscored = [name for name, result in scores.tasks.items() if result.error]
    if unscored:
        raise DataError(f"{len(unscored)} of {len(scores.tasks)} tasks could not be scored: {', '.join(unscored)}")


@app.command
def check(
    model: str,
    /,
    *,
    suite: Path,
    junit: Annotated[Path | None, Parameter(help="A JUnit XML file for CI.")] = None,
    json: Annotated[Path | None, Parameter(help="A JSON file with limits, scores and new failures.")] = None,
    flags: Annotated[CheckFlags, Parameter(name="*")] = NO_CHECK_FLAGS,
) -> None:
    """Regression gate: exit 1, with the items that went wrong, where a suite's limit is broken.

    Parameters
    ----------
    model
        What eval takes, or a JSON file that eval wrote.
    suite
        A YAML file of tasks with limits; see suites/.
    """
    from prunetune.evaluation.suites import api, output
    from prunetune.evaluation.suites.junit import render_junit
    from prunetune.utils.console import evaluation_progress
    from prunetune.utils.files import check_writable, write_text

    options = read_options(CheckOptions, flags_to_overrides(flags), where="check")
    check_writable(junit, "--junit")
    check_writable(json, "--json")
    with evaluation_progress() as progress:
        result = api.check(model, suite, options=options, progress=progress)
    if junit is not None:
        write_text(junit, render_junit(result, f"prunetune check {model}"))
    if json is not None:
        write_text(json, result.to_json())
    print(output.render_check(result))
    if result.broken:
        raise LimitBroken(f"{len(result.broken)} of {len(result.verdicts)} limits broken: {result.broken[0].says}")
    if result.errors:
        raise DataError(f"{len(result.errors)} tasks could not be judged: {', '.join(result.errors)}")


@app.command
def bench(
    *models: str,
    json: Annotated[Path | None, Parameter(help="A JSON file with settings, device, versions and figures.")] = None,
    flags: Annotated[BenchFlags, Parameter(name="*")] = NO_BENCH_FLAGS,
) -> None:
    """Latency, throughput, memory and file size, models taking turns; ratios to the first, a run's dense model.

    Parameters
    ----------
    models
        Runs, model folders, hub names, or .gguf files (through llama.cpp).
    """
    from json import dumps

    from prunetune.bench.api import measure_models
    from prunetune.bench.table import render_bench
    from prunetune.utils.files import check_writable, write_text

    options = read_options(BenchOptions, flags_to_overrides(flags), where="bench")
    check_writable(json, "--json")
    found = measure_models(models, options)
    if json is not None:
        write_text(json, dumps(found.to_dict(), indent=2) + "\n")
    print(render_bench(found))


def main() -> None:
    """Entry point: exit 0 done, 1 a gate failed, 2 the user must correct something, 130 interrupted, 141 unread."""
    own, others = (
        (logging.ERROR, logging.ERROR) if rank_and_world_size()[0] else (logging.INFO, logging.WARNING)
    )  # rank 0 speaks
    logging.basicConfig(format="%(message)s", level=others, stream=sys.stderr)
    logging.getLogger("prunetune").setLevel(own)
    for noisy in ("httpx", "transformers", "peft", "accelerate", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # The run's own lines say what these bars and notes would; read by transformers when it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    limit_openmp_threads(os.environ)  # read by torch when it is imported
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    sys.exit(run_and_exit_on_failure(_run_app))


def _raise_keyboard_interrupt(*_: object) -> None:
    """As Ctrl-C, also where that is ignored: in the background of a script."""
    raise KeyboardInterrupt


def _run_app() -> int:
    if single := single_process_error(next(iter(sys.argv[1:]), "")):
        return _say(single, 2)
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except UnusedCliTokensError as wrong:
        given = " ".join(wrong.unused_tokens or ())
        return _say(f"{given}: belongs to no option; a switch takes its value by =, such as --deterministic=true", 2)
    except CycloptsError as wrong:
        return _say(" ".join(str(wrong).split()), 2)
    except PrunetuneError as wrong:
        return _say(str(wrong), wrong.exit_code)
    except KeyboardInterrupt:
        resumable = sys.argv[1:2] in (["run"], ["demo"], ["compare"]) and "--dry-run" not in sys.argv
        what = "told to stop, as when another rank ends" if rank_and_world_size()[1] > 1 else "interrupted"
        return _say(f"{what}; go on with --resume" if resumable else what, 130)
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        return EXIT_OUTPUT_CLOSED
    except Exception as error:
        explained = explain_failure(error)
        if explained is None:  # a bug: its traceback is what helps
            raise
        if is_gpu_fault(error):  # where it happened matters, too
            traceback.print_exception(error)
        return _say(explained, 2)
    return 0


def _is_output_closed() -> bool:
    """Whether nobody reads what is printed any more, as behind `| head`; what is left of it then goes nowhere."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    unread = any(event & select.POLLERR for _, event in output.poll(0))
    if unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return unread


def _say(line: str, code: int) -> int:
    print(f"prunetune: {rank_prefix()}{line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
