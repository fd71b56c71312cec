"""The command line: a user error prints one line with the next step, exits with 2, and writes nothing."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

import prunetune.cli.app
import prunetune.pipeline.run
from prunetune.cli.flags import ESSENTIAL_OPTIONS
from prunetune.errors import LimitBroken
from prunetune.utils import console
from support.data import pairs, write_lines
from support.evaluation import characters, speaker

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    speaker().save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(dense: Path, tmp_path: Path) -> Callable[..., str]:
    """A recipe that is valid except for the changes; its run folder is tmp_path/run."""

    def write(**changes: Any) -> str:
        rows = tmp_path / "rows.jsonl"
        if not rows.exists():
            write_lines(rows, *pairs(20))
        values = {"model": str(dense), "out": str(tmp_path / "run"), "device": "cpu", "data": {"train": [str(rows)]}}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | changes))
        return str(tmp_path / "recipe.yaml")

    return write


def refused(outcome: tuple[int, str, str], *parts: str) -> None:
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("prunetune: ")
    assert "Traceback" not in err
    for words in parts:
        assert words in err


@pytest.fixture(autouse=True)
def _nothing_is_written(tmp_path: Path) -> Any:
    yield
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.rglob("*.partial"))


# -- data ------------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Which?", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ("empty",)),
        ("\n\n", ("empty",)),
        ('{"prompt": "x", ', ("bad.jsonl:1", "JSON")),
        ("3", ("bad.jsonl:1",)),
        (json.dumps({"prompt": "no answer"}), ("bad.jsonl:1", "completion")),
        (json.dumps({"question": "x", "reply": "y"}), ("bad.jsonl:1", "prompt + completion")),
        (json.dumps(GOOD | {"answer": 2}), ("bad.jsonl:1", "0..1")),
        (json.dumps(GOOD | {"answer": -1}), ("bad.jsonl:1", "0..1")),
        (json.dumps({"prompt": "", "completion": "b"}) + "\n", ("bad.jsonl:1", "empty")),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"answer": 9}), ("bad.jsonl:2",)),
    ],
)
def test_bad_row_is_refused_with_file_and_line(
    line: str, parts: tuple[str, ...], say: Said, recipe: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    refused(say("run", recipe(data={"train": [str(tmp_path / "bad.jsonl")]})), *parts)


def test_row_that_is_not_utf8_is_refused_with_its_line(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    refused(say("run", recipe(data={"train": [str(tmp_path / "bad.jsonl")]})), "bad.jsonl:1", "UTF-8")


def test_missing_data_is_refused(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    refused(say("run", recipe(data={"train": [str(tmp_path / "absent.jsonl")]})), "absent.jsonl", "no such file")
    refused(say("run", recipe(data={"train": [str(tmp_path / "*.none")]})), "glob")
    refused(say("run", recipe(data={})), "data.train")
    refused(say("run", recipe(data={"train": [str(tmp_path)]})), "folder")


def test_overlapping_splits_are_refused_with_both_rows(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", *pairs(20))
    test = write_lines(tmp_path / "b.jsonl", *pairs(5, start=19))
    refused(say("run", recipe(data={"train": [train], "test": [test]})), "overlap", "a.jsonl:20", "b.jsonl:1", "drop")


def test_too_few_rows_are_refused(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    refused(say("run", recipe(data={"train": [write_lines(tmp_path / "a.jsonl", *pairs(2))]})), "too few")


def test_prompt_longer_than_the_context_is_refused_with_its_row(
    say: Said, recipe: Callable[..., str], tmp_path: Path
) -> None:
    rows = [*pairs(20), {"prompt": "long " * 100, "completion": "x"}]
    source = write_lines(tmp_path / "long.jsonl", *rows)
    refused(say("run", recipe(data={"train": [source]})), "256", "long.jsonl:21", "data.too_long=truncate")


# -- recipes and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"budgte": {"keep": 0.5}}, ("unknown key budgte",)),
        ({"budget": {"kep": 0.5}}, ("unknown key budget.kep", "did you mean budget.keep?")),
        ({"keep": 0.5}, ("unknown key keep", "did you mean budget.keep?")),
        ({"train": {"learning_rte": 1}}, ("did you mean train.learning_rate?",)),
        ({"budget": {"keep": 0}}, ("budget.keep must lie in (0, 1], got 0",)),
        ({"budget": {"keep": 1.5}}, ("budget.keep must lie in (0, 1], got 1.5",)),
        ({"budget": {"keep": "half"}}, ("budget.keep must be a finite number",)),
        ({"budget": {"keep": float("nan")}}, ("budget.keep must be a finite number",)),
        ({"budget": 0.5}, ("budget is a section",)),
        ({"train": {"steps": 1.5}}, ("train.steps must be a whole number",)),
        ({"train": {"steps": True}}, ("train.steps must be a whole number",)),
        ({"layout": "unifrom"}, ("did you mean uniform?",)),
        ({"search": {"share": 0.9, "settle": 0.2}}, ("search.share + search.settle",)),
    ],
)
def test_bad_option_is_refused_by_name(
    changes: dict[str, Any], parts: tuple[str, ...], say: Said, recipe: Callable[..., str]
) -> None:
    refused(say("run", recipe(**changes)), *parts)


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_infeasible_budget_names_the_smallest_feasible(layout: str, say: Said, recipe: Callable[..., str]) -> None:
    outcome = say("run", recipe(budget={"keep": 0.01}, layout=layout))
    refused(outcome, "budget.keep 0.01", "below what is feasible (0.")
    named = outcome[2].partition("feasible (")[2].partition(")")[0]
    refused(say("run", recipe(budget={"keep": float(named) - 0.002}, layout=layout)), named)


def test_flags_win_over_the_recipe(say: Said, recipe: Callable[..., str]) -> None:
    refused(say("run", recipe(), "--budget.keep", "0.01"), "feasible")
    refused(say("run", recipe(), "--budget.keep", "2"), "budget.keep must lie in")
    refused(say("run", recipe(budget={"keep": 3}), "--budget.keep", "0.01"), "feasible")


def test_missing_or_broken_recipe_is_refused(say: Said, tmp_path: Path) -> None:
    refused(say("run", str(tmp_path / "absent.yaml")), "absent.yaml", "recipes/")
    refused(say("run", str(tmp_path)), "is a folder: name a recipe")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }")
    refused(say("run", str(tmp_path / "broken.yaml")), "not valid YAML")
    (tmp_path / "list.yaml").write_text("- a\n")
    refused(say("run", str(tmp_path / "list.yaml")), "maps keys to values")


def test_unknown_flag_or_command_is_refused(say: Said, recipe: Callable[..., str]) -> None:
    refused(say("run", recipe(), "--budget.kep", "0.5"), "--budget.kep")
    refused(say("run", recipe(), "--train.steps", "many"), "many")
    refused(say("prune"), "prune")
    refused(say("run"), "name a recipe", "--data.train")
    refused(say("sites"), "MODEL")


def test_bad_comparison_is_refused(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    refused(say("compare", recipe(), "--compare.methods", "tailor"), "'tailor'", "did you mean taylor?")
    refused(say("compare", recipe(compare={"kep": 0.5})), "unknown key compare.kep", "did you mean compare.keeps?")
    refused(say("compare", recipe(), "--compare.keeps", "2"), "compare.keeps must lie in (0, 1], got 2")
    refused(say("compare", recipe(), "--compare.keeps", "0.5,2"), "compare.keeps must lie in (0, 1], got 2")
    refused(say("compare", recipe(), "--compare.methods", "taylor,tailor"), "'tailor'", "did you mean taylor?")
    refused(say("compare", recipe(), "--compare.keeps", "0.5,many"), "--compare.keeps", "many")
    refused(say("compare", recipe(), "--compare.keeps", "0.01"), "feasible")
    refused(say("compare", recipe(compare={"seeds": ["a"]})), "compare.seeds must be a whole number")
    refused(say("compare", recipe(), "--compare.variants", str(tmp_path)), "cannot read")


# -- models and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "quantum", "cpu:x"])
def test_bad_device_is_refused(device: str, say: Said, recipe: Callable[..., str]) -> None:
    outcome = say("run", recipe(), "--device", device)
    refused(outcome, f"device {device!r}", "use cpu, cuda or auto")
    assert "mkldnn" not in outcome[2], "no list of all that PyTorch knows"


@pytest.mark.parametrize("kind", ["mamba", "nonsense"])
def test_unknown_architecture_is_refused(kind: str, say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text(
        json.dumps({"model_type": kind, "n_layer": 2, "n_embd": 8, "n_head": 2})
    )
    refused(say("run", recipe(model=str(tmp_path / "unknown"))), kind)
    refused(say("sites", str(tmp_path / "unknown")), kind)


def test_gpt2_folder_without_tokenizer_is_refused(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "dumb").mkdir()
    (tmp_path / "dumb" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2})
    )
    refused(say("run", recipe(model=str(tmp_path / "dumb"))), "tokenizer")


def test_missing_model_is_refused(say: Said, recipe: Callable[..., str], tmp_path: Path) -> None:
    refused(say("run", recipe(model=str(tmp_path / "absent"))), "absent")
    refused(say("run", recipe(model=str(tmp_path / "absent.gguf"))), "no such file")
    (tmp_path / "hollow").mkdir()
    refused(say("run", recipe(model=str(tmp_path / "hollow"))), "config.json")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": "lla')
    refused(say("run", recipe(model=str(tmp_path / "torn"))), "torn")


def test_folder_without_tokenizer_is_refused(
    say: Said, recipe: Callable[..., str], dense: Path, tmp_path: Path
) -> None:
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute" / "config.json").write_text((dense / "config.json").read_text())
    refused(say("run", recipe(model=str(tmp_path / "mute"))), "tokenizer")


# -- resources and endings -------------------------------------------------------------------------------------------


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(prunetune.pipeline.run, "run", run)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines"),
        torch.AcceleratorError("CUDA error: out of memory\nmore lines"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_names_the_options_to_lower(
    error: Exception, say: Said, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, error)
    refused(say("run", recipe()), "out of memory", "train.micro_tokens", "--resume")


def test_gpu_fault_has_traceback_and_next_step(
    say: Said, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, torch.AcceleratorError("CUDA error: unspecified launch failure\nmore lines"))
    code, _, err = say("run", recipe())
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("prunetune: the GPU failed (CUDA error: unspecified launch failure)")
    assert "--resume" in err.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_one_line(
    error: Exception, say: Said, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, error)
    refused(say("run", recipe()), "the disk is full", "--resume")


def test_interruption_names_resume(say: Said, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    code, _, err = say("run", recipe())
    assert code == 130
    assert err == "prunetune: interrupted; continue with --resume\n"


@pytest.mark.parametrize(
    ("out", "parts"),
    [
        ("{tmp}/rows.jsonl/run", ("rows.jsonl is a file", "--out")),
        ("{tmp}/" + "x" * 300, ("no file can have so long a name",)),
        ("", ("out '' names no folder", "--out")),
        ("a\0b", ("no file can have such a name",)),
    ],
)
def test_run_folder_that_cannot_be_made_is_refused(
    out: str, parts: tuple[str, ...], say: Said, recipe: Callable[..., str], tmp_path: Path
) -> None:
    for dry in ((), ("--dry-run",), ("--resume",)):
        refused(say("run", recipe(out=out.format(tmp=tmp_path)), *dry), *parts)


def test_read_only_folder_is_refused(
    say: Said, recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)  # root may write anywhere
    refused(say("run", recipe(), "--dry-run"), f"{tmp_path} cannot be written to", "--out")


def test_out_expands_the_home_folder(
    say: Said, recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").touch()
    refused(say("run", recipe(out="~/mine")), f"{tmp_path / 'mine'} is a file")


def test_dry_run_refuses_limits_and_trackers_as_the_run_does(say: Said, recipe: Callable[..., str]) -> None:
    for changes in ({"limits": ["valid.accuracy >= 0.5 -> stop"]}, {"report_to": ["mlflow"]}):
        refusals = [say("run", recipe(**changes), *dry) for dry in ((), ("--dry-run",))]
        refused(refusals[0])
        assert refusals[0] == refusals[1]


@pytest.mark.parametrize("written", [b"{{{", b"\xff\xfe", b"seed: 1\nseed: 2\n", b"seed: [\n", b"sed: 1\n"])
def test_run_folder_with_a_broken_recipe_is_refused(
    written: bytes, say: Said, recipe: Callable[..., str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    (broken / "model").mkdir(parents=True)
    (broken / "config.yaml").write_bytes(written)
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: {a: {data: rows.jsonl, scorer: nll}}")
    file = str(broken / "config.yaml")
    refused(say("watch", broken), file)
    refused(say("compare-runs", broken, broken), file)
    refused(say("run", recipe(out=str(broken)), "--resume"), file, "--out")
    code, _, err = say("check", broken, "--suite", suite, "--device", "cpu")
    assert code == 2
    assert file in err.splitlines()[-1]


def test_broken_limit_exits_with_1(say: Said, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, LimitBroken("the limit is broken"))
    assert say("run", recipe())[::2] == (1, "prunetune: the limit is broken\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "broken disk"), ZeroDivisionError()])
def test_bug_keeps_its_traceback(
    error: Exception, say: Said, recipe: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, error)
    with pytest.raises(type(error)):
        say("run", recipe())


# -- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_sites_prints_the_smallest_feasible_keep(
    layout: str, say: Said, dense: Path, recipe: Callable[..., str]
) -> None:
    code, out, err = say("sites", str(dense), "--layout", layout, "--align", "8")
    assert (code, err) == (0, "")
    last = out.strip().splitlines()[-1]
    assert last.startswith(f"smallest feasible budget.keep, layout {layout}: 0.")
    floor = float(last.rpartition(" ")[2])
    # Below the printed floor a run is refused with the same number, give or take its rounding.
    outcome = say("run", recipe(budget={"keep": floor - 0.002, "align": 8}, layout=layout))
    refused(outcome, "feasible")
    assert float(outcome[2].partition("feasible (")[2].partition(")")[0]) == pytest.approx(floor, abs=0.0011)
    assert "attention" in out
    assert "mlp" in out


def test_sites_as_json_are_what_the_table_says(say: Said, dense: Path) -> None:
    code, out, err = say("sites", str(dense), "--json")
    assert (code, err) == (0, "")
    described = json.loads(out)
    assert described["prunable_params"] == sum(site["units"] * site["unit_params"] for site in described["sites"])
    assert f"{described['min_keep']:.3f}" in say("sites", str(dense))[1].splitlines()[-1]


def test_help_of_run_begins_with_the_essential_options(say: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = say("run", "--help")
    groups = re.findall(r"^╭─ (.+?) ─*╮$", out, re.MULTILINE)
    assert groups[:6] == ["Arguments", "Parameters", "Essential options", "Further options", "data", "data.columns"]
    essential = out.partition("Essential options")[2].partition("╰")[0]
    flags = re.findall(r"^│ --([\w.-]+)", essential, re.MULTILINE)
    assert tuple(flag.replace("-", "_") for flag in flags) == ESSENTIAL_OPTIONS
    assert max(map(len, out.splitlines())) == 80


def test_completion_script_completes_commands_options_and_choices(say: Said, tmp_path: Path) -> None:
    (tmp_path / "completion").write_text(say("completion", "bash")[1])
    ask = """source "$0"; COMP_WORDS=(prunetune "$@"); COMP_CWORD=$#; _prunetune; echo "${COMPREPLY[@]}" """
    for words, answer in (
        (["ru"], "run runs"),
        (["export", "x", "--to", "o"], "onnx"),
        (["run", "--lora.r"], "--lora.rank"),
    ):
        done = subprocess.run(
            ["bash", "-c", ask, str(tmp_path / "completion"), *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == answer, done.stderr


@pytest.mark.parametrize(
    "arguments", [("--help",), ("run", "--help"), ("compare", "--help"), ("sites", "--help"), ("--version",)]
)
def test_help_exits_with_0(arguments: tuple[str, ...], say: Said) -> None:
    code, out, err = say(*arguments)
    assert (code, err) == (0, "")
    assert out.strip()


def test_report_of_a_folder_that_is_no_run_is_refused(say: Said, tmp_path: Path) -> None:
    refused(say("report", str(tmp_path)), str(tmp_path))
    refused(say("report", str(tmp_path / "absent")), "absent")


STOPPED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
import prunetune.cli.app
prunetune.cli.app.app = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
sys.argv = ["prunetune", *sys.argv[1:]]
prunetune.cli.app.main()
"""


@pytest.mark.parametrize(
    ("command", "line"), [("run", "interrupted; continue with --resume"), ("bench", "interrupted")]
)
def test_sigterm_ends_a_command_as_ctrl_c_does(command: str, line: str) -> None:
    ended = subprocess.run([sys.executable, "-c", STOPPED, command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, f"prunetune: {line}\n")


LOGGING = """
import logging, sys
import prunetune.cli.app
def app(*_, **__):
    logging.getLogger("onnxscript.rewriter").info("what a library does")
    logging.getLogger("onnxscript.rewriter").warning("what a library warns of")
    logging.getLogger("prunetune.utils.console").info("step 1")
prunetune.cli.app.app = app
sys.argv = ["prunetune", "export", "runs/a", *sys.argv[1:]]
prunetune.cli.app.main()
"""


def test_log_holds_own_info_and_warnings_of_libraries() -> None:
    ended = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=False)
    lines = [line.partition(" ") for line in ended.stderr.splitlines()]
    assert (ended.returncode, [text for _, _, text in lines]) == (0, ["what a library warns of", "step 1"])
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", time) for time, _, _ in lines), "a log has times"
    quiet = subprocess.run([sys.executable, "-c", LOGGING, "-q"], capture_output=True, text=True, check=False)
    assert quiet.stderr.count("\n") == 1, "what a library warns of"


def test_plain_log_has_the_time_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    plain = console.PlainConsole(10)
    with caplog.at_level("INFO"):
        plain.stage("tune", 700)
        for step in range(1, 21):
            plain.step({"step": step, "phase": "search", "loss": 1.0, "kept": 1.0})
            clock[0] += 6
    assert [line.partition(", ")[2] for line in caplog.messages] == ["", "", "about 69 min left", "about 68 min left"]


def test_value_after_a_switch_is_refused_with_the_right_form(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prunetune", "run", "none.yaml", "--evaluate.dense_tuned", "false"])
    assert prunetune.cli.app._run_app() == 2
    assert "false: belongs to no option; write the value of a switch with =" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "code"), [("runs", prunetune.cli.app.EXIT_OUTPUT_CLOSED), ("--help", 1)]
)  # 1: how rich ends so
def test_closed_output_ends_silently(verb: str, code: int, tmp_path: Path) -> None:
    """The same happens with `| head`, which closes its input."""
    words = [verb, str(tmp_path)] if verb == "runs" else [verb]
    with subprocess.Popen(
        [sys.executable, "-m", "prunetune.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == code


def test_plain_log_names_every_cut_also_between_its_lines(caplog: pytest.LogCaptureFixture) -> None:
    plain = console.PlainConsole(log_every=10)
    plain.stage("tune and prune", 20)
    with caplog.at_level("INFO"):
        for step in range(1, 21):
            cut: dict[str, Any] = {"widths": {"a": 3}} if step in (4, 7) else {}
            plain.step({"step": step, "phase": "prune" if step < 7 else "tune", "loss": 1.0, "kept": 0.8, **cut})
    lines = [record.getMessage() for record in caplog.records]
    assert [line for line in lines if "cut" in line] == [
        "cut before step 4: 80.0% kept",
        "cut before step 7: 80.0% kept",
    ]
