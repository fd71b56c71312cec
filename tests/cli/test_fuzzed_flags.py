"""Law of the command line: whatever flags say, a command works or prints one line, and nothing is written elsewhere."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetune.bench.options import BenchOptions
from prunetune.cli import app
from prunetune.config.fields import fields_by_path
from prunetune.config.recipe import RunConfig, WorkloadConfig
from prunetune.evaluation.suites.options import CheckOptions
from support.fuzz import ODD, fuzzed, refused_or_fine

RUN_FLAGS = [path for path in fields_by_path(RunConfig) if path != "model"]
# Command and what it needs, and flags that it has: none of them finds a model, so that none works long.
COMMANDS = {
    ("run", "recipe.yaml", "--dry-run"): RUN_FLAGS,
    ("compare", "recipe.yaml"): RUN_FLAGS,
    ("sites", "./none"): ["layout", "align", "units", "device", *fields_by_path(WorkloadConfig)],
    ("eval", "./none", "--suite", "suite.yaml"): ["out", *fields_by_path(CheckOptions)],
    ("check", "./none", "--suite", "suite.yaml"): ["json", "junit", *fields_by_path(CheckOptions)],
    ("bench", "./none"): ["json", *fields_by_path(BenchOptions)],
    ("data", "./none.csv"): [path for path in RUN_FLAGS if path.startswith("data.")],
    ("export", "./none"): ["out", "to", "dtype", "quantize", "pad"],
    ("runs", "."): ["model", "status", "where"],
}
VALUES = st.one_of(
    ODD.filter(lambda value: not isinstance(value, int) or value.bit_length() < 9999).map(str), st.text()
)


@given(data=st.data(), command=st.sampled_from(sorted(COMMANDS)))
@fuzzed(30)
def test_any_flag_is_taken_or_refused_in_one_line(
    data: st.DataObject,
    command: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flags"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("recipe.yaml").write_text("model: ./none\ndata: {train: [./none.jsonl]}\n")
    Path("suite.yaml").write_text("tasks: {a: {data: none.jsonl, scorer: rouge}}\n")
    flags = data.draw(st.lists(st.sampled_from(COMMANDS[command]), min_size=1, max_size=2, unique=True))
    arguments = [f"--{flag}={data.draw(VALUES)}".replace("\0", "") for flag in flags]
    output = io.StringIO()
    with (
        refused_or_fine(),
        mock.patch("sys.argv", ["prunetune", *command, *arguments]),
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        try:
            code = app._run_app()
        except SystemExit as ended:
            code = int(ended.code or 0)
    lines = [line for line in output.getvalue().splitlines() if line.startswith("prunetune: ")]
    assert code in (0, 1, 2)
    assert len(lines) == (code != 0), output.getvalue()
