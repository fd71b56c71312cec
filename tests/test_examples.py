"""The worked examples: every command of their pages runs from top to bottom, on a tiny model instead of the page's."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from prunetune.export import selfcheck
from support.again import ReaderHere
from support.data import subwords
from support.models import tiny

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(page.parent for page in ROOT.glob("examples/*/README.md"))
TICKETS = ROOT / "examples" / "support-tickets"
SHORT = [
    *("--train.steps=2", "--train.batch-size=2", "--search.init-batches=1", "--search.cuts=1", "--budget.align=8"),
    *("--evaluate.limit=6", "--evaluate.drift=false", "--require.smaller=0", "--require.prompt=8"),
    *("--require.generate=2", "--require.runs=2", "--device=cpu", "--dtype=float32"),
]
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny(vocab_size=400, max_position_embeddings=512).save_pretrained(folder)
    subwords().save_pretrained(folder)
    return folder


def commands(folder: Path) -> list[tuple[str, list[str]]]:
    """(what is piped in, the words after `prunetune`) of every command of an example's page."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)).splitlines()
    parts = [line.rpartition("prunetune ") for line in lines]
    return [(before.removeprefix('echo "').removesuffix('" | '), shlex.split(words)) for before, _, words in parts]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_commands_of_an_example_run_in_their_order(
    folder: Path, model: Path, say: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder.name == "icd-10":
        pytest.importorskip("simple_icd_10_cm")
    monkeypatch.setattr(selfcheck, "FreshReader", ReaderHere)  # a fresh process takes seconds
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    ran = commands(folder)
    assert [words[0] for _, words in ran].count("run") >= 2  # the dry run, and the run
    for piped, words in ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        short = [f"--model={model}", *SHORT] if words[0] == "run" else []
        code, text, error = say(*words, *short)
        assert code == 0 or (code, words[0]) == (1, "check"), (words, error)  # a random model may break its limit
        assert text
    assert list(Path("runs").glob("*/report.html"))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_page_of_an_example_shows_its_files(folder: Path) -> None:
    page = (folder / "README.md").read_text(encoding="utf-8")
    for file in folder.glob("*.yaml"):
        assert f"```yaml\n{file.read_text(encoding='utf-8')}```\n" in page, file.name


def test_tickets_are_what_their_script_writes() -> None:
    """If this fails, run `python examples/support-tickets/make.py`."""
    made = runpy.run_path(str(TICKETS / "make.py"))["files"]()
    texts = {file.name: file.read_text(encoding="utf-8").splitlines() for file in TICKETS.glob("*.jsonl")}
    assert {name: len(rows) for name, rows in made.items()} == {name: len(rows) for name, rows in texts.items()}
    for name, rows in made.items():
        assert [json.loads(line) for line in texts[name]] == rows
