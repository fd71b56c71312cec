"""The commands: each reads its options, calls a function of the package and prints. Heavy imports wait until then."""

from __future__ import annotations

import logging
import os
import select
import shlex
import signal
import sys
import traceback
import typing
from dataclasses import asdict, replace
from importlib import resources
from json import dumps, loads
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError

from prunetune.bench.options import BenchOptions
from prunetune.cli.chat_options import ChatOptions
from prunetune.cli.flags import flags_to_overrides, make_flags_class
from prunetune.config.fields import read_options
from prunetune.config.recipe import (
    DataConfig,
    RunConfig,
    UnitName,
    WorkloadConfig,
    from_mapping,
    load_recipe,
    merge_options,
    to_mapping,
)
from prunetune.errors import ConfigError, DataError, LimitBroken, PrunetuneError
from prunetune.evaluation.suites.options import CheckOptions, EvalOptions
from prunetune.export.result import ExportOptions
from prunetune.utils.failures import explain_failure, is_gpu_fault
from prunetune.utils.files import STANDARD_OUTPUT, check_writable, expand_path, write_text
from prunetune.utils.launch import rank_and_world_size, rank_prefix, run_and_exit_on_failure, single_process_error
from prunetune.utils.threads import limit_openmp_threads
from prunetune.utils.untrusted import printable

app = App(
    name="prunetune",
    help="Tune and structurally prune a language model for one domain, in one run.",
    version_flags=["--version"],
    help_on_error=False,
    suppress_keyboard_interrupt=False,  # `_run_app` says how to resume
)
# Every option of a recipe as a flag, all optional: flags win over the recipe.
Flags: typing.TypeAlias = make_flags_class(RunConfig)  # type: ignore[valid-type]
EXIT_OUTPUT_CLOSED = 141  # nobody reads the output any more: a shell's exit code for SIGPIPE
NO_FLAGS = Flags()
BenchFlags: typing.TypeAlias = make_flags_class(BenchOptions)  # type: ignore[valid-type]
NO_BENCH_FLAGS = BenchFlags()
EvalFlags: typing.TypeAlias = make_flags_class(EvalOptions)  # type: ignore[valid-type]
NO_EVAL_FLAGS = EvalFlags()
CheckFlags: typing.TypeAlias = make_flags_class(CheckOptions)  # type: ignore[valid-type]
NO_CHECK_FLAGS = CheckFlags()
ChatFlags: typing.TypeAlias = make_flags_class(ChatOptions)  # type: ignore[valid-type]
NO_CHAT_FLAGS = ChatFlags()
WorkloadFlags: typing.TypeAlias = make_flags_class(WorkloadConfig)  # type: ignore[valid-type]
NO_WORKLOAD_FLAGS = WorkloadFlags()
DataFlags: typing.TypeAlias = make_flags_class(DataConfig)  # type: ignore[valid-type]
NO_DATA_FLAGS = DataFlags()
DEFAULT_UNITS: tuple[UnitName, ...] = ("kv-groups", "mlp-channels")
UserPath: typing.TypeAlias = Annotated[Path, Parameter(converter=lambda _, tokens: expand_path(tokens[0].value))]


session = app.meta

PrintJson: typing.TypeAlias = Annotated[
    bool, Parameter(name="--json", negative=(), help="Print all that is known as JSON, for scripts.")
]


@session.default
def _with_session_options(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    quiet: Annotated[
        bool, Parameter(name=("--quiet", "-q"), negative=(), help="Print results, warnings and errors only.")
    ] = False,
) -> None:
    if quiet:
        logging.getLogger("prunetune").setLevel(logging.WARNING)
    words: list[str] = []
    for word in tokens:  # cyclopts takes a lone - for an option: --json - becomes --json=-
        if word == "-" and words and words[-1].startswith("--"):
            words[-1] += "=-"
        else:
            words.append(word)
    app(words, exit_on_error=False, print_error=False)


session.suppress_keyboard_interrupt = False
session.group_parameters = Group("Options of every command", sort_key=99)


@app.command
def run(
    recipe: UserPath | None = None,
    /,
    *,
    resume: Annotated[bool, Parameter(negative=(), help="Resume a run that was stopped: name its folder.")] = False,
    dry_run: Annotated[
        bool,
        Parameter(negative=(), help="Check model, data and budgets, print what the budgets mean, and write nothing."),
    ] = False,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
) -> None:
    """Tune and prune a model, verify it, evaluate it and write a report, in one run folder.

    Parameters
    ----------
    recipe
        A YAML file of options; see recipes/. Without one, --data.train (and --model) say what to do; with --resume, the
        run folder is enough.
    """
    config = _read_config(recipe, flags, resume=resume)
    if dry_run:
        from prunetune.cli.preview import render_dry_run

        _print(render_dry_run(config, resume=resume))
        return
    from prunetune.pipeline.run import run as run_pipeline

    _print_run(run_pipeline(config, resume=resume, command=shlex.join(["prunetune", *sys.argv[1:]])))


@app.command
def demo(
    *,
    resume: Annotated[bool, Parameter(negative=(), help="Resume a demo that was stopped.")] = False,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
) -> None:
    """Run on a small real model and clinical coding terms, which are packages. Needs no GPU and no recipe."""
    with resources.as_file(resources.files("prunetune") / "demo.yaml") as recipe:
        config = load_recipe(recipe, flags_to_overrides(flags))
    from prunetune.pipeline.run import run as run_pipeline

    _print_run(run_pipeline(config, resume=resume, command=shlex.join(["prunetune", *sys.argv[1:]])))


def _read_config(recipe: Path | None, flags: object, *, resume: bool) -> RunConfig:
    """The options of a recipe, of the run folder that is resumed, or all defaults, in which flags replace values."""
    overrides = flags_to_overrides(flags)
    if recipe is None:
        recipe = expand_path(overrides.get("out", RunConfig.out))
        if not (resume and recipe.is_dir()):
            if not overrides.get("data", {}).get("train"):
                raise ConfigError("name a recipe (see recipes/), or rows to tune on with --data.train, and --model")
            return from_mapping(overrides, where="flags")
    if not recipe.is_dir():
        return load_recipe(recipe, overrides)
    if not resume:
        raise ConfigError(f"{recipe} is a folder: name a recipe in it, or continue the run in it with --resume")
    from prunetune.runs.folder import open_run

    # Code of a model runs by the user's own word only, not by that of a folder, which may be a stranger's.
    saved = to_mapping(open_run(recipe)[1]) | {"out": str(recipe), "trust_remote_code": False}
    return from_mapping(merge_options(saved, overrides), where=f"{recipe}/config.yaml")


def _print_run(folder: Path) -> None:
    """Print what a run made, on rank 0 only."""
    if not rank_and_world_size()[0]:
        from prunetune.cli.output import render_run

        _print(render_run(folder))


@app.command
def compare(
    recipe: UserPath,
    /,
    *others: UserPath,
    resume: Annotated[bool, Parameter(negative=(), help="Resume a comparison that was stopped, or extend it.")] = False,
    keep_best: Annotated[bool, Parameter(negative=(), help="Keep what wins: compare.keep_best.")] = False,
    flags: Annotated[Flags, Parameter(name="*")] = NO_FLAGS,
) -> None:
    """Compare dense, two-stage and progressive models with equal help, over budgets, seeds and learning rates.

    Parameters
    ----------
    recipe
        A YAML file of options; its section `compare` says what is compared. With --resume, its folder is enough.
    others
        Further recipes of the same model, data and budget: rows of the same table, by the names of their files.
    """
    from prunetune.compare.methods import NOT_OF_A_METHOD
    from prunetune.compare.run import compare as run_comparison
    from prunetune.compare.terminal import render_comparison

    config = _read_config(recipe, flags, resume=resume)
    recipes = (*config.compare.recipes, *map(str, others))
    compared = replace(config.compare, recipes=tuple(dict.fromkeys(recipes)))
    config = replace(config, compare=replace(compared, keep_best=keep_best or compared.keep_best))
    if recipes and (changes := flags_to_overrides(flags).keys() - NOT_OF_A_METHOD):
        raise ConfigError(
            f"flags of {', '.join(sorted(changes))} would change the first of several recipes only: say it in the "
            f"recipes; flags of {', '.join(NOT_OF_A_METHOD)} count for all"
        )
    folder = run_comparison(config, resume=resume, command=shlex.join(["prunetune", *sys.argv[1:]]))
    _print(render_comparison(folder))


@app.command
def sites(
    model: str,
    /,
    *,
    layout: Annotated[
        Literal["per-layer", "uniform"], Parameter(help="per-layer: widths differ by layer; uniform: one width.")
    ] = "per-layer",
    align: Annotated[int, Parameter(help="MLP widths are multiples of this; 0: chosen by the width of the MLPs.")] = 0,
    units: Annotated[
        tuple[UnitName, ...],
        Parameter(help="Kinds of unit that may be pruned, see budget.units.", negative=(), show_default=", ".join),
    ] = DEFAULT_UNITS,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps; the device that latency is for.")] = "auto",
    measure: Annotated[
        bool, Parameter(negative=(), help="Measure the latency table of this device, if none is cached yet.")
    ] = False,
    workload: Annotated[WorkloadFlags, Parameter(name="*")] = NO_WORKLOAD_FLAGS,
    trust_remote_code: Annotated[bool, Parameter(negative=(), help="Run code that comes with the model.")] = False,
    json: PrintJson = False,
) -> None:
    """Show which modules can be pruned, and what budgets mean in bytes, FLOPs and time. Reads no weights.

    Parameters
    ----------
    model
        A folder, a hub name (owner/name, owner/name@revision), a .gguf file, or 'demo'.
    """
    from prunetune.cli.preview import describe_sites, render_sites

    if json:
        _print_json(describe_sites(model, layout, align, units, trust_remote_code=trust_remote_code))
        return
    requests = read_options(WorkloadConfig, flags_to_overrides(workload), where="sites")
    _print(
        render_sites(
            model, layout=layout, align=align, units=units, trust_remote_code=trust_remote_code,
            workload=requests, device=device, measure=measure,
        )
    )  # fmt: skip


@app.command
def data(
    *files: str,
    model: Annotated[str, Parameter(help="Show tokens as this model sees them, and which the loss counts.")] = "",
    trust_remote_code: Annotated[bool, Parameter(negative=(), help="Run code that comes with the model.")] = False,
    flags: Annotated[DataFlags, Parameter(name="data")] = NO_DATA_FLAGS,
) -> None:
    """Show what rows are read as: their shape, three of them as the model sees them, lengths, unused columns.

    Parameters
    ----------
    files
        Files, globs or hub names, as in data.train.
    """
    from rich.console import Console

    from prunetune.cli.data_view import render_data

    config = read_options(DataConfig, flags_to_overrides(flags), where="data")
    lines = list(render_data(files, config, model, trust_remote_code=trust_remote_code))
    Console(highlight=False).print(*lines, sep="\n", soft_wrap=True)


@app.command
def runs(
    folder: UserPath = Path("runs"),
    /,
    *,
    model: Annotated[str, Parameter(help="Only runs whose model name contains this.")] = "",
    status: Annotated[
        str, Parameter(help="Only runs that are done, running, interrupted, failed or 'limit broken'.")
    ] = "",
    where: Annotated[
        tuple[str, ...],
        Parameter(negative=(), help="Only runs for which this holds, such as 'accuracy >= 0.7'.", show_default=False),
    ] = (),
    json: PrintJson = False,
) -> None:
    """List the runs, sizes and comparisons of a folder, and of those in $PRUNETUNE_HOME's runs.txt, newest first.

    Parameters
    ----------
    folder
        The folder that holds the run folders.
    """
    from prunetune.runs.history import list_runs
    from prunetune.runs.listing import filter_runs, render_runs_table, runs_to_json

    entries = filter_runs(list_runs(folder), model=model, status=status, where=where)
    _print(runs_to_json(entries) if json else render_runs_table(entries))


@app.command(name="compare-runs")
def compare_runs(first: UserPath, /, *others: UserPath) -> None:
    """Compare finished runs with the first: options, scores, units kept in both, and items that flipped.

    Parameters
    ----------
    first
        The run folder that the others are compared with.
    others
        Further run folders.
    """
    from prunetune.runs.diff import diff_runs

    _print(diff_runs([first, *others]))


@app.command
def watch(
    run: UserPath,
    /,
    *,
    web: Annotated[
        bool, Parameter(negative=(), help="Show the report in a browser, refreshed, with the runs of the same folder.")
    ] = False,
    port: Annotated[int, Parameter(help="The port of --web on this computer; 0: any free one.")] = 6016,
) -> None:
    """Show the progress of a run in a terminal until it ends, or with --web in a browser until it is stopped.

    Parameters
    ----------
    run
        The run folder.
    """
    if web:
        from prunetune.cli.watch_server import serve_run

        serve_run(run, port, announce=_print)
        return
    from prunetune.runs.watch import watch_run

    watch_run(run)


@app.command
def report(run: UserPath, /) -> None:
    """Write the report.html of a run again.

    Parameters
    ----------
    run
        The run folder.
    """
    from prunetune.report import write_report

    _print(write_report(run))


@app.command
def export(
    run: UserPath,
    /,
    *,
    to: Annotated[
        Literal["uniform", "per-layer", "gguf", "onnx", "mlx"] | None, Parameter(help="Default: the layout of the run.")
    ] = None,
    quantize: Annotated[
        Literal["int8", "int4"] | None,
        Parameter(help="Weight-only quantization; opens with torchao, or bitsandbytes (int4)."),
    ] = None,
    out: Annotated[UserPath | None, Parameter(help="Folder to write; default: exports/ of the run folder.")] = None,
    dtype: Annotated[
        str, Parameter(help="f32, f16, bf16; gguf also q8_0, q4_k_m, ...; default: that of the format.")
    ] = "",
    pad: Annotated[
        bool, Parameter(negative=(), help="With uniform: pad narrower layers with zeros, which costs what was saved.")
    ] = False,
    imatrix_tokens: Annotated[
        int,
        Parameter(help="q4_k_m, ...: tokens of the run's data for llama.cpp's importance matrix; 0: none."),
    ] = ExportOptions.imatrix_tokens,
    trust_remote_code: Annotated[
        bool, Parameter(negative=(), help="Run code that comes with the model folder.")
    ] = False,
    json: PrintJson = False,
) -> None:
    """Write the model of a finished run in another format, open it again and compare.

    Parameters
    ----------
    run
        A run folder, or a model folder that prunetune wrote.
    """
    from prunetune.export.formats import export_run
    from prunetune.utils.console import show_stage

    options = ExportOptions(dtype=dtype, pad=pad, quantize=quantize or "", imatrix_tokens=imatrix_tokens)
    with show_stage("export"):
        result = export_run(run, to or "", out=out, options=options, trust_remote_code=trust_remote_code)
    if json:
        _print_json(asdict(result) | {"path": str(result.path)})
    else:
        _print(result)


@app.command
def chat(model: str, /, *, flags: Annotated[ChatFlags, Parameter(name="*")] = NO_CHAT_FLAGS) -> None:
    """Chat with a run's model in the terminal; a pipe gives one question a line. Answers are greedy.

    Parameters
    ----------
    model
        A run, a model folder, a hub name, or a .gguf file.
    """
    options = read_options(ChatOptions, flags_to_overrides(flags), where="chat")
    from prunetune.cli.chat import chat as start_chat

    if failures := start_chat(model, options):
        raise DataError(f"{failures} questions could not be asked: the lines above say why")


@app.command
def serve(
    model: str,
    /,
    *,
    server: Annotated[
        Literal["auto", "transformers", "llama.cpp"], Parameter(help="auto: transformers; llama.cpp for .gguf files.")
    ] = "auto",
    host: Annotated[
        str, Parameter(help="Address to listen on; the default can be reached from here only.")
    ] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on.")] = 8000,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1, mps; for transformers.")] = "auto",
) -> None:
    """Serve a model as an OpenAI-compatible endpoint, by transformers' or llama.cpp's server, until Ctrl-C.

    Parameters
    ----------
    model
        A run, a model folder, a hub name, or a .gguf file.
    """
    from prunetune.cli.serve import serve as start_server

    start_server(model, server=server, host=host, port=port, device=device)


@app.command
def push(
    run: UserPath,
    repository: str,
    /,
    *,
    public: Annotated[bool, Parameter(negative=(), help="Make the repository public; default: private.")] = False,
    dry_run: Annotated[
        UserPath | None, Parameter(help="Send nothing, and write what would be sent into this folder, as OWNER/NAME.")
    ] = None,
    adapter: Annotated[
        bool, Parameter(negative=(), help="Also send the dense tuned model, as a LoRA adapter in adapter/.")
    ] = False,
    language: Annotated[
        tuple[str, ...],
        Parameter(
            negative=(), help="Languages for the card, such as en; default: those of the base.", show_default=False
        ),
    ] = (),
) -> None:
    """Put the model of a finished run on the Hugging Face hub, private, with a card of its scores.

    Parameters
    ----------
    run
        A run folder.
    repository
        OWNER/NAME on the hub; it is made if it is not there.
    """
    from prunetune.pipeline.push import push_run

    _print(push_run(run, repository, public=public, dry_run=dry_run, adapter=adapter, languages=language))


@app.command(name="eval")
def evaluate(
    model: str,
    /,
    *,
    suite: UserPath,
    out: Annotated[
        UserPath | None,
        Parameter(help="Write scores and items to this JSON file, which check reads too; -: print them."),
    ] = None,
    flags: Annotated[EvalFlags, Parameter(name="*")] = NO_EVAL_FLAGS,
) -> None:
    """Score any model on a suite: every task with standard errors, or why it cannot be scored.

    Parameters
    ----------
    model
        A run, a model folder, a hub name, a .gguf file, or an OpenAI-compatible endpoint (http://host:port/v1).
    suite
        A YAML file of tasks; see suites/.
    """
    from prunetune.evaluation.suites import evaluate_and_check, output
    from prunetune.utils.console import evaluation_progress

    options = read_options(EvalOptions, flags_to_overrides(flags), where="eval")
    check_writable(out, "--out")
    with evaluation_progress() as progress:
        scores = evaluate_and_check.evaluate(model, suite, options=options, progress=progress)
    written = evaluate_and_check.evaluation_to_json(scores, model, str(suite)) if out else ""
    _print_or_write(output.render_evaluation(scores), out, written)
    unscored = [name for name, result in scores.tasks.items() if result.error]
    if unscored:
        raise DataError(f"{len(unscored)} of {len(scores.tasks)} tasks could not be scored: {', '.join(unscored)}")


@app.command
def check(
    model: str,
    /,
    *,
    suite: UserPath,
    junit: Annotated[UserPath | None, Parameter(help="Write a JUnit XML file for CI.")] = None,
    html: Annotated[UserPath | None, Parameter(help="Write limits, scores and new failures as a page.")] = None,
    json: Annotated[
        UserPath | None, Parameter(help="Write limits, scores and new failures to this JSON file; -: print them.")
    ] = None,
    flags: Annotated[CheckFlags, Parameter(name="*")] = NO_CHECK_FLAGS,
) -> None:
    """Compare a model with a reference. Exits with 1 if a limit of the suite is broken, and lists new failures.

    Parameters
    ----------
    model
        As for eval, or a JSON file that eval wrote.
    suite
        A YAML file of tasks with limits; see suites/.
    """
    from prunetune.evaluation.suites import evaluate_and_check, output
    from prunetune.evaluation.suites.http_client import public_url
    from prunetune.evaluation.suites.junit import render_junit
    from prunetune.utils.console import evaluation_progress

    options = read_options(CheckOptions, flags_to_overrides(flags), where="check")
    for file, flag in ((junit, "--junit"), (html, "--html"), (json, "--json")):
        check_writable(file, flag)
    with evaluation_progress() as progress:
        result = evaluate_and_check.check(model, suite, options=options, progress=progress)
    if junit is not None:
        write_text(junit, render_junit(result, f"prunetune check {public_url(model)}"))
    if html is not None:
        from prunetune.report.check_page import render_check_page

        write_text(html, render_check_page(result, public_url(model), str(suite)))
    _print_or_write(output.render_check(result), json, result.to_json() if json else "")
    if result.broken:
        raise LimitBroken(f"{len(result.broken)} of {len(result.verdicts)} limits broken: {result.broken[0].says}")
    if result.errors:
        raise DataError(f"{len(result.errors)} tasks could not be judged: {', '.join(result.errors)}")


@app.command
def history(
    suite: UserPath,
    /,
    *,
    json: PrintJson = False,
) -> None:
    """List the scores of a suite over time: a row for each version of a model that was scored, newest first.

    Parameters
    ----------
    suite
        The suite's file. Scores are kept in suite_scores.jsonl of $PRUNETUNE_HOME, or of the cache folder.
    """
    from prunetune.evaluation.suites.score_history import read_scores, render_history

    versions = read_scores(suite)
    if json:
        _print_json([scored.to_dict() for scored in versions])
    else:
        _print(render_history(suite, versions))


@app.command
def bench(
    *models: str,
    json: Annotated[
        UserPath | None,
        Parameter(help="Write settings, device, versions and figures to this JSON file; -: print."),
    ] = None,
    flags: Annotated[BenchFlags, Parameter(name="*")] = NO_BENCH_FLAGS,
) -> None:
    """Measure latency, throughput, memory and file size of models, interleaved, beside a run's dense model.

    Parameters
    ----------
    models
        Runs, model folders, hub names, or .gguf files (through llama.cpp).
    """
    from prunetune.bench.measure_models import measure_models
    from prunetune.bench.table import render_bench

    options = read_options(BenchOptions, flags_to_overrides(flags), where="bench")
    check_writable(json, "--json")
    result = measure_models(models, options)
    _print_or_write(render_bench(result), json, dumps(result.to_dict(), indent=2) + "\n")


@app.command
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print a script that completes commands and options: prunetune completion bash > FILE; source FILE."""
    print(app.generate_completion(shell=shell))


def main() -> None:
    """Entry point; exits with 0 (done), 1 (limit broken), 2 (user error), 130 (interrupted) or 141 (output closed)."""
    is_rank_0 = not rank_and_world_size()[0]  # which logs for all
    handler = _StderrHandler()
    handler.setFormatter(
        _PrintableFormatter("%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING if is_rank_0 else logging.ERROR)
    logging.captureWarnings(True)
    sys.excepthook = _print_traceback
    logging.getLogger("prunetune").setLevel(logging.INFO if is_rank_0 else logging.ERROR)
    for noisy in ("httpx2", "transformers", "peft", "accelerate", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Our log has what their bars and notes would say. transformers reads these when it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    limit_openmp_threads(os.environ)  # read by torch when it is imported
    signal.signal(signal.SIGTERM, _raise_keyboard_interrupt)
    sys.exit(run_and_exit_on_failure(_run_app))


def _raise_keyboard_interrupt(number: int, _: object) -> None:
    """Stop as for Ctrl-C, which is ignored in the background of a script, and which has no number."""
    raise KeyboardInterrupt(number)


def _run_app() -> int:
    if single := single_process_error(_command()):
        return _fail(single, 2)
    try:
        session(sys.argv[1:], exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except UnusedCliTokensError as wrong:
        given = " ".join(wrong.unused_tokens or ())
        advice = "write the value of a switch with =, such as --deterministic=true"
        return _fail(f"{given}: belongs to no option; {advice}", 2)
    except CycloptsError as wrong:
        return _fail(" ".join(str(wrong).split()), 2)
    except PrunetuneError as wrong:
        return _fail(str(wrong), wrong.exit_code)
    except KeyboardInterrupt:
        resumable = _command() in ("run", "demo", "compare") and "--dry-run" not in sys.argv
        message = "told to stop, as when another rank ends" if rank_and_world_size()[1] > 1 else "interrupted"
        return _fail(f"{message}; continue with --resume" if resumable else message, 130)
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        return EXIT_OUTPUT_CLOSED
    except Exception as error:
        explained = explain_failure(error)
        if explained is None:  # a bug: its traceback is what helps
            raise
        if is_gpu_fault(error):  # where it happened matters, too
            _print_traceback(type(error), error, error.__traceback__)
        return _fail(explained, 2)
    return 0


def _command() -> str:
    """The command's name, "" if none is named; --quiet may stand before it."""
    return next((word for word in sys.argv[1:] if word not in ("-q", "--quiet")), "")


def _is_output_closed() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; the rest of the output is then discarded."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


def _print(result: object) -> None:
    """Print on standard output; texts of others, in names and errors, do not steer the terminal."""
    print(printable(str(result)))


def _print_or_write(result: object, file: Path | None, as_json: str) -> None:
    """Print a result and write its JSON to the file, if one is named; for "-" print the JSON instead."""
    if file == STANDARD_OUTPUT:
        _print_json(loads(as_json))
        return
    if file is not None:
        write_text(file, as_json)
    _print(result)


def _print_json(values: object) -> None:
    print(dumps(values, indent=1))


class _StderrHandler(logging.Handler):
    """Writes to what standard error is at the moment: a live line replaces it, so that log lines stay above it."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _print_traceback(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, frames))), end="", file=sys.stderr)


def _fail(line: str, code: int) -> int:
    """Print a line on standard error; returns the exit code."""
    print(printable(f"prunetune: {rank_prefix()}{line}".replace("\n", " ")), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
