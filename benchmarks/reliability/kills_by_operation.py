"""Kills each command that writes at a file operation, resumes or repeats it, and compares what comes out.

    python benchmarks/reliability/kills_by_operation.py [--kills 200] [--seed 0] [--jobs 2] [--commands run export ...]

An operation is one that changes files: a file opened for writing, a rename, a removal, a new folder, a database opened.
An uninterrupted command counts its operations; then each kill is SIGKILL just before the one that was drawn, which
leaves behind what a kill between two operations leaves (a new file may still be empty). Of a run, half of the kills
are followed by a second one while it resumes. The command then goes on (`--resume` where there is one, else the same
command again): what comes out has to equal what the uninterrupted command wrote, or the command has to be refused in
one line, after which another `--out` has to give the same. Models and rows are made here; processes are forks of one
that has everything imported, also those in which a run opens what it wrote, so that hundreds of kills take minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import yaml
from rows import give

from support.data import subwords
from support.evaluation import speaker, write_model_and_rows

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "data": {"test_share": 0.25, "valid_share": 0.2},
    "budget": {"keep": 0.6, "align": 8},
    "train": {"steps": 12, "batch_size": 4, "checkpoint_every": 3, "validate_every": 4},
    "lora": {"rank": 4, "dense_rank": 4},
    "search": {"init_batches": 2, "batch_size": 4},
    "evaluate": {"limit": 5, "generate_limit": 2, "max_new_tokens": 4, "dense_tuned": False},
}
SUITE = {"tasks": {"choice": {"data": "choices.jsonl", "scorer": "accuracy", "limit": 12, "limits": {"min": 0.0}}}}
VOLATILE = (
    "commit",
    "seconds",
    "peak",
    "memory",
    "time",
    "date",
    "host",
    "ms",
    "tokens_per_s",
)  # in names of measured fields
FINE = ("equal", "refused, then equal")
start_program = subprocess.run
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Command:
    """What is killed: its words, how it goes on, and what of it has to be equal."""

    words: Callable[[Path], list[str]]  # of the folder that this attempt may write to
    outcome: Callable[[Path], Any]
    resumes: bool = False  # else the same words are given again


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options.add_argument("--commands", nargs="+", default=None, help="some of them; default: all")
    options.add_argument("--out", type=Path, help="append a row for results.jsonl to this file; default: print it")
    given = options.parse_args()
    import_everything()
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepare(Path(scratch))
        commands = make_commands(folder)
        commands = {name: commands[name] for name in given.commands or commands}
        shares = [range(job, given.kills, given.jobs) for job in range(given.jobs)]
        children = [fork(partial(work, folder, commands, share, given.seed)) for share in shares]
        codes = [os.waitpid(child, 0)[1] for child in children]
        files = sorted(folder.glob("results-*"))
        results = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    fine = [result for result in results if result["outcome"] in FINE]
    by_command = {name: sum(result["command"] == name for result in results) for name in commands}
    give(
        {
            "bar": "N2", "case": f"kills at file operations: {by_command}", "value": len(fine), "target": given.kills,
            "met": len(fine) == given.kills and not any(codes), "unit": "kills that end equal or refused",
            "device": "cpu",
            "command": "python benchmarks/reliability/kills_by_operation.py " + " ".join(sys.argv[1:]), "final": False,
        },
        given.out,
    )  # fmt: skip
    for result in results:
        if result not in fine:
            print(json.dumps(result), file=sys.stderr)
    sys.exit(0 if len(fine) == given.kills else 1)


def import_everything() -> None:
    """All that commands import later, so that a fork starts at once."""
    import matplotlib.figure
    import peft
    import rouge_score.rouge_scorer
    import torch
    import transformers

    import prunetune.cli.app
    import prunetune.compare.run
    import prunetune.evaluation.suites.evaluate_and_check
    import prunetune.export.formats
    import prunetune.pipeline.run
    import prunetune.report

    torch.set_num_threads(1)  # a fork has no threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    matplotlib.figure.Figure.savefig = draw_nothing  # type: ignore[method-assign]
    assert all([peft, rouge_score, transformers, prunetune])


def draw_nothing(_: Any, file: Any, **__: Any) -> None:
    """Figures take a fifth of a run and write no file: a page holds them inline."""
    file.write('<svg viewBox="0 0 1 1"></svg>')


def prepare(folder: Path) -> Path:
    """Models, rows, recipes and a suite; and a finished run, which some commands start from."""
    write_model_and_rows(folder, 40)
    tokenizer = subwords(chat=None)  # llama.cpp opens none without merges
    for written in (tokenizer, speaker(vocab_size=len(tokenizer))):
        written.save_pretrained(folder / "dense")
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "choices.jsonl").write_text("".join(line for line in lines if "choices" in line), encoding="utf-8")
    rows = {"model": str(folder / "dense"), "data": {**RECIPE["data"], "train": [str(folder / "rows.jsonl")]}}
    recipes = {
        "run": {"evaluate": RECIPE["evaluate"] | {"dense_tuned": True}},
        "sizes": {"budget": {"keep": [0.8, 0.6], "align": 8}},
        "limits": {  # rolls back: the first state that is validated meets it, and a rate this high breaks it later
            "limits": ["valid.nll <= 0.93x -> roll-back"],
            "train": {**RECIPE["train"], "validate_every": 2, "learning_rate": 1.0},
        },
        "compare": {"compare": {"methods": ["dense", "progressive", "magnitude"], "jobs": 1}},
    }
    for name, changes in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**RECIPE, **rows, **changes}), encoding="utf-8")
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE), encoding="utf-8")
    made = fork(
        lambda: run_command(["run", str(folder / "run.yaml"), "--out", str(folder / "made")], folder / "made.log")
    )
    if os.waitpid(made, 0)[1]:
        raise SystemExit((folder / "made.log").read_text()[-2000:])
    return folder


def make_commands(folder: Path) -> dict[str, Command]:
    """Every command that writes."""

    def training(name: str) -> Callable[[Path], list[str]]:
        verb = "compare" if name == "compare" else "run"
        return lambda attempt: [verb, str(folder / f"{name}.yaml"), "--out", str(attempt / "out")]

    made, suite = str(folder / "made"), ["--suite", str(folder / "suite.yaml")]
    gguf = ["--to", "gguf", "--dtype", "f32", "--out"]
    return {
        "run": Command(training("run"), models_in, resumes=True),
        "sizes": Command(training("sizes"), models_in, resumes=True),
        "limits": Command(training("limits"), models_in, resumes=True),
        "compare": Command(training("compare"), cells_in, resumes=True),
        "export": Command(lambda at: ["export", made, *gguf, str(at / "out")], files_in),
        "eval": Command(lambda at: ["eval", made, *suite, "--out", str(at / "scores.json")], reports_in),
        "check": Command(
            lambda at: ["check", made, *suite, "--against", str(folder / "dense"), "--junit", str(at / "junit.xml"),
                        "--json", str(at / "check.json")], reports_in,
        ),
        "report": Command(lambda at: ["report", str(at / "copy")], lambda at: (at / "copy" / "report.html").exists()),
    }  # fmt: skip


def models_in(attempt: Path) -> Any:
    """Digests of plans and weights of a run and of its sizes."""
    files = [*attempt.rglob("plan.json"), *attempt.rglob("model/*.safetensors")]
    return {str(file.relative_to(attempt)): sha256(file) for file in files if "checkpoints" not in file.parts}


def cells_in(attempt: Path) -> Any:
    """Cells and table of a comparison, without what was measured."""
    cells = [json.loads(file.read_text()) for file in sorted((attempt / "out" / "cells").glob("*.json"))]
    return [without_measurements(cell) for cell in cells]


def files_in(attempt: Path) -> Any:
    """Digests of exported weights."""
    return {file.name: sha256(file) for file in sorted((attempt / "out").rglob("*.gguf"))}


def reports_in(attempt: Path) -> Any:
    """JSON reports without what was measured; XML as it is."""
    values = {file.name: without_measurements(json.loads(file.read_text())) for file in sorted(attempt.glob("*.json"))}
    return values | {file.name: len(file.read_text()) > 0 for file in attempt.glob("*.xml")}


def without_measurements(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: without_measurements(item) for key, item in value.items() if not any(word in key for word in VOLATILE)
        }
    return [without_measurements(item) for item in value] if isinstance(value, list) else value


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def work(folder: Path, commands: dict[str, Command], kills: range, seed: int) -> int:
    """The kills of one process; a line for each in its file."""
    job = kills.start
    rng, results = random.Random(f"{seed}/{job}"), folder / f"results-{job}"
    uninterrupted: dict[str, tuple[int, Any]] = {}
    for kill in kills:
        name, command = list(commands.items())[kill // kills.step % len(commands)]
        if name not in uninterrupted:
            uninterrupted[name] = measure(folder, f"{name}-{job}-whole", command)
        operations, expected = uninterrupted[name]
        attempt = begin(folder, f"{name}-{job}-{kill}")
        at = [rng.randrange(1, operations + 1)]
        if command.resumes and rng.random() < 0.5:
            at.append(rng.randrange(1, operations + 1))
        outcome = after_kills(attempt, command, at, expected)
        shutil.rmtree(attempt) if outcome in FINE else None
        line = json.dumps({"command": name, "at": at, "of": operations, "outcome": outcome})
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr, flush=True)
    return 0


def begin(folder: Path, name: str) -> Path:
    """The folder of an attempt, with caches of its own and a copy of the finished run."""
    attempt = folder / name
    attempt.mkdir()
    if name.startswith("report"):
        shutil.copytree(folder / "made", attempt / "copy")
        (attempt / "copy" / "report.html").unlink()
    return attempt


def measure(folder: Path, name: str, command: Command) -> tuple[int, Any]:
    """How many operations the uninterrupted command has, and what comes out."""
    attempt = begin(folder, name)
    code = ended(attempt, command.words(attempt), 0)
    if code:
        raise SystemExit(f"{name} ended with {code}: {(attempt / 'log').read_text()[-2000:]}")
    return int((attempt / "operations").read_text()), command.outcome(attempt)


def after_kills(attempt: Path, command: Command, at: list[int], expected: Any) -> str:
    """Kill, go on, and say how it ended."""
    words = command.words(attempt)
    for operation in at:
        if ended(attempt, goes_on(words, command, attempt), operation) != -signal.SIGKILL:
            break  # it went on from where it stood, and ended before
    else:
        code = ended(attempt, goes_on(words, command, attempt), 0)
        if code == 2 and "Traceback" not in last_output(attempt):
            again = begin(attempt.parent, attempt.name + "-again")
            code = ended(again, command.words(again), 0)
            found = command.outcome(again)
            shutil.rmtree(again)
            line = last_output(attempt).strip().splitlines()[-1]
            return "refused, then equal" if code == 0 and found == expected else f"refused: {line}"
        if code:
            return f"exit code {code}: {last_output(attempt)[-1500:]}"
    found = command.outcome(attempt)
    return "equal" if found == expected else f"differs: {json.dumps(found)[:300]} {json.dumps(expected)[:300]}"


def goes_on(words: list[str], command: Command, attempt: Path) -> list[str]:
    """`--resume` may always be given."""
    return [*words, "--resume"] if command.resumes and (attempt / "log").exists() else words


def last_output(attempt: Path) -> str:
    return (attempt / "log").read_text(errors="replace").rpartition("$ prunetune")[2]


def ended(attempt: Path, words: list[str], kill_at: int) -> int:
    """The exit code of a command in a fork; negative where a signal ended it."""
    child = fork(lambda: run_command(words, attempt / "log", attempt / "operations", kill_at))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_command(words: list[str], log: Path, count_file: Path | None = None, kill_at: int = 0) -> int:
    """A command in this process; counts its operations, and kills itself before the one that is named."""
    os.environ["PRUNETUNE_CACHE"] = str(log.parent / "cache")
    os.environ["PRUNETUNE_HOME"] = str(log.parent)
    with log.open("a") as file:
        file.write(f"$ prunetune {' '.join(words)}\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    operations = 0
    root = str(log.parent)

    process = os.getpid()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operations
        if os.getpid() != process:  # what the process starts is not killed
            return
        if event == "open":
            path, mode, flags = arguments
            changes = (
                isinstance(path, str)
                and path.startswith(root)
                and (any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & WRITES))
            )
        else:
            names = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "sqlite3.connect")
            changes = event in names and (root in str(arguments[0]) or event in ("os.remove", "os.rmdir"))
        if changes:
            operations += 1
            if operations == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    from prunetune.cli.app import main as run_cli

    sys.argv = ["prunetune", *words]
    subprocess.run = run_in_fork  # type: ignore[assignment]
    sys.addaudithook(hook)
    code = 0
    try:
        run_cli()
    except SystemExit as ended_with:
        code = int(ended_with.code or 0)
    if count_file is not None and not kill_at:
        count_file.write_text(str(operations))
    return code


def run_in_fork(
    words: list[str], *, env: dict[str, str] | None = None, cwd: str | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A program text for Python in a fork, where it finds everything imported; its errors go to the log."""
    if "-c" not in words:
        return start_program(words, env=env, cwd=cwd, **options)
    program, arguments = words[words.index("-c") + 1], words[words.index("-c") + 2 :]

    def action() -> int:
        import transformers.dynamic_module_utils

        transformers.dynamic_module_utils.HF_MODULES_CACHE = (env or os.environ).get("HF_MODULES_CACHE", "")
        sys.argv = ["-c", *arguments]
        os.chdir(cwd or ".")
        exec(program, {"__name__": "__main__"})
        return 0

    code = os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])
    return subprocess.CompletedProcess(words, code, "", "see above")


def fork(action: Callable[[], int]) -> int:
    """The process id of a fork that does it, and ends with its exit code."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = action()
    except SystemExit as ended_with:
        print(ended_with, file=sys.stderr)
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
