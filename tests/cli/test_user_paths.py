"""Laws of paths that users name: in every place, a name that no file can have is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prunetune.config.recipe import DataConfig, RunConfig
from prunetune.data.sources import read_records
from prunetune.errors import ConfigError, RunFolderError
from prunetune.evaluation.suites.suite import parse_suite
from prunetune.runs.folder import check_folder

Say = Callable[..., tuple[int, str, str]]
NOBODY, LONG = "~nosuchuser/x", "a" * 300
COMMANDS = (
    ["run", "PATH"], ["run", "recipe.yaml", "--dry-run", "--out=PATH"], ["run", "recipe.yaml", "--model=PATH"],
    ["run", "PATH", "--dry-run"], ["compare", "PATH"], ["compare", "recipe.yaml", "--compare.variants=PATH"],
    ["sites", "PATH"], ["bench", "PATH"], ["bench", "x", "--json=PATH"], ["export", "PATH"],
    ["export", ".", "--out=PATH"], ["eval", "PATH", "--suite", "suite.yaml"], ["eval", "x", "--suite=PATH"],
    ["eval", "x", "--suite=suite.yaml", "--out=PATH"], ["check", "x", "--suite=suite.yaml", "--junit=PATH"],
    ["check", "x", "--suite=suite.yaml", "--json=PATH"], ["report", "PATH"], ["watch", "PATH"], ["runs", "PATH"],
    ["compare-runs", ".", "PATH"],
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("data: {train: [rows.jsonl]}\n")
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "a{n}", "completion": "b"}}\n' for n in range(20)))
    Path("suite.yaml").write_text("tasks: {a: {data: demo, scorer: accuracy}}\n")


@pytest.mark.parametrize("name", [NOBODY, LONG], ids=["nobody's", "long"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_takes_such_a_path(command: list[str], name: str, say: Say) -> None:
    code, _, error = say(*(word.replace("PATH", name) for word in command))
    assert code == 2
    assert "there is no such user" in error or "no file can have so long a name" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["recipe.yaml", "rows.jsonl", "suite.yaml"]


@pytest.mark.parametrize("name", [NOBODY, LONG], ids=["nobody's", "long"])
def test_no_source_of_data_is_such_a_path(name: str) -> None:
    for sources, root in (((f"{name}.jsonl",), ""), (("a.jsonl",), name)):
        with pytest.raises(ConfigError, match=r"no such user|so long a name"):
            read_records(sources, DataConfig(root=root), "train")
    with pytest.raises(ConfigError, match=r"no such user|so long a name"):
        parse_suite({"tasks": {"a": {"data": "a.jsonl", "scorer": "rouge"}}, "root": name})


def test_run_folder_that_is_a_link_to_nowhere_is_refused() -> None:
    Path("link").symlink_to("nowhere")
    for out in ("link", "link/run"):
        with pytest.raises(RunFolderError, match="link is a link to nothing"):
            check_folder(RunConfig(out=out), resume=False)
