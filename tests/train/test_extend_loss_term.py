"""The page docs/extend/loss-term.md works: its script runs, and its two edits put the term into a run of training."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune.data import batches
from prunetune.train import losses
from support.passes import assert_same, gradients

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend" / "loss-term.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def apply_edit(diff: str, root: Path) -> str:
    """Apply a diff without line numbers, whose context occurs once in the file; returns the file's name."""
    (name,) = re.findall(r"^\+\+\+ b/(.+)$", diff, re.MULTILINE)
    lines = diff.splitlines()[2:]
    before, after = ("\n".join(line[1:] for line in lines if line[:1] != sign) for sign in "+-")
    text = (root / name).read_text(encoding="utf-8")
    assert text.count(before) == 1, before
    (root / name).write_text(text.replace(before, after), encoding="utf-8")
    return name


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """The names that the page's script defines; its term is removed after the test."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "TERMS", dict(losses.TERMS))
        patch.setattr(batches, "TOKEN_STEP", 32)
        patch.setattr(batches, "LABEL_STEP", 32)
        (text,) = blocks("python")
        exec(compile(text, "loss-term.md", "exec"), names)
        names["gradients"] = [gradients_of(names, kind) for kind in ("PaddedPasses", "PackedPasses")]
        losses.TERMS.pop("z_loss")
        names["gradients without"] = gradients_of(names, "PaddedPasses")
    assert "z_loss" not in losses.TERMS
    return names


def gradients_of(names: dict[str, Any], kind: str) -> dict[str, torch.Tensor]:
    gradients(names["model"])
    names[kind](names["model"], names["sites"], 0, names["config"]).tune(names["batch"], None)
    return gradients(names["model"])


def test_script_gives_equal_losses_padded_and_packed(script: dict[str, Any]) -> None:
    assert set(script["padded"]) == {"loss", "z_loss"}
    assert script["packed"] == pytest.approx(script["padded"], rel=1e-5)


def test_script_term_is_mean_over_all_tokens(script: dict[str, Any]) -> None:
    batch = [torch.tensor([example.token_ids]) for example in script["batch"]]
    with torch.no_grad():
        squares = torch.cat([script["model"](ids).logits[0].logsumexp(-1).square() for ids in batch])
    assert script["padded"]["z_loss"] == pytest.approx(0.1 * float(squares.mean()), rel=1e-4)


def test_script_term_has_a_gradient_equal_padded_and_packed(script: dict[str, Any]) -> None:
    padded, packed = script["gradients"]
    assert_same(padded, packed)
    without = script["gradients without"]
    assert all(not torch.allclose(padded[name], without[name]) for name in without if ".lora_B." in name)


RUN = """
import json
from prunetune.config.recipe import from_mapping
from prunetune.data import batches
from prunetune.train import loop
from prunetune.train.passes import PackedPasses
from support.loop import config_of, job_of

batches.TOKEN_STEP = batches.LABEL_STEP = 32
runs = {}
for name, weight in (("off", 0.0), ("padded", 0.1), ("packed", 0.1)):
    loop.build_passes = PackedPasses if name == "packed" else loop.build_passes
    job = job_of(config_of({"train": {"z_loss": weight, "steps": 6}}))
    loop.tune_and_prune(job)
    runs[name] = job.observer.steps
print(json.dumps(runs))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Steps of runs by a copy of the source to which the page's edits were applied."""
    root = tmp_path_factory.mktemp("edited")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    edited = {apply_edit(diff, root) for diff in blocks("diff")}
    assert edited == {"src/prunetune/config/training.py", "src/prunetune/train/losses.py"}
    paths = os.pathsep.join(str(path) for path in (root / "src", ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return steps


def test_edited_source_records_the_term_in_every_step(runs: dict[str, list[dict[str, Any]]]) -> None:
    assert all(step["z_loss"] > 0 for step in runs["padded"])
    assert all(step["search_z_loss"] > 0 for step in runs["padded"] if step["phase"] == "search")
    assert all("z_loss" not in step and "search_z_loss" not in step for step in runs["off"])


def test_edited_source_trains_with_the_term(runs: dict[str, list[dict[str, Any]]]) -> None:
    padded, packed, off = ([step["loss"] for step in runs[name]] for name in ("padded", "packed", "off"))
    assert packed == pytest.approx(padded, rel=1e-3)
    assert padded != pytest.approx(off, rel=1e-3)
