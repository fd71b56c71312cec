"""The made-up sample in examples/data: both recipes run on it, and a clone says where data comes from."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from support.data import subwords
from support.models import tiny

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "examples" / "data"
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny(vocab_size=400, max_position_embeddings=2048).save_pretrained(folder)
    subwords().save_pretrained(folder)
    return folder


def test_sample_is_what_its_script_writes(tmp_path: Path) -> None:
    """If this fails, run `python examples/data/make.py`."""
    script = runpy.run_path(str(SAMPLE / "make.py"))
    script["main"](tmp_path)
    written = {str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*.jsonl")}
    assert set(written) == set(script["files"]())
    assert written == {str(file.relative_to(SAMPLE)): file.read_bytes() for file in SAMPLE.rglob("*.jsonl")}


@pytest.mark.parametrize("domain", ["legal", "healthcare"])
def test_recipe_passes_its_dry_run_on_the_sample(domain: str, say: Said, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = ROOT / "recipes" / f"{domain}.yaml"
    code, text, error = say("run", recipe, "--data.root", SAMPLE, "--model", model, "--out", out, "--dry-run")
    assert code == 0, error
    assert "nothing was written" in text
    assert not out.exists()


@pytest.mark.parametrize("domain", ["legal", "healthcare"])
def test_recipe_without_its_data_names_the_sample_and_the_script(domain: str, say: Said, model: Path) -> None:
    code, text, error = say("run", ROOT / "recipes" / f"{domain}.yaml", "--model", model, "--dry-run")
    assert (code, text, error.count("\n")) == (2, "", 1)
    for words in ("train.jsonl: no such file", "--data.root examples/data", "benchmarks/data/build.py --out DATA"):
        assert words in error
