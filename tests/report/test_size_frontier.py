"""The page of several sizes: quality, size and speed of each, also of an unfinished run or with hostile names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prunetune.report import write_report
from prunetune.report.run_folder import read_run
from prunetune.report.size_frontier import load_size_rows, summary_line
from support.page import ATTACK, Outline, steering
from support.report import make_sizes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_sizes(tmp_path_factory.mktemp("sizes") / "three")
    write_report(folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_page_has_every_size_and_the_dense_model(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    outline = Outline(page)
    links = [link for link in outline.attributes("href") if not link.startswith("#")]
    assert links == [f"sizes/{name}/report.html" for name in ("0.8", "0.6", "0.4")]
    assert all((run / link).parent.is_dir() for link in links)
    assert "3 sizes from one run, decoder 20% to 60% smaller" in page
    assert page.count("<svg") == 2
    assert "1.28× (1.25 to 1.32)" in page
    assert "MLP width of layer 7 is 613" in page  # of the sizes that are too slow
    assert "teacher, for all sizes" in page
    assert not outline.attributes("src")
    assert page == page_of(run)


def test_frontier_leaves_out_sizes_that_another_beats(run: Path) -> None:
    rows = load_size_rows(run, read_run(run))
    # 0.6 is as good as 0.8 here, faster and smaller; 0.4 is the smallest.
    assert {row.name: row.on_frontier for row in rows} == {"0.8": False, "0.6": True, "0.4": True}


def test_unfinished_run_has_a_page(copy: Path) -> None:
    shutil.rmtree(copy / "sizes" / "0.4")
    (copy / "sizes" / "0.6" / "manifest.json").unlink()
    (copy / "sizes" / "0.8" / "evaluation" / "pruned.json").write_text("{")
    assert "0.4/report.html" not in page_of(copy)
    shutil.rmtree(copy / "sizes")
    assert "No size was started yet" in page_of(copy)
    assert summary_line([]) == "Several sizes from one run: no results yet"


def test_hostile_text_is_escaped(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest |= {"sizes": [*manifest["sizes"], ATTACK, "/etc", "../three"], "failed": ATTACK, "command": ATTACK}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    size_manifest = copy / "sizes" / "0.4" / "manifest.json"
    size_manifest.write_text(json.dumps(json.loads(size_manifest.read_text()) | {"failed": ATTACK}))
    page = page_of(copy)
    outline = Outline(page)
    assert not steering(page)
    assert not {"script", "img"} & {tag for tag, _ in outline.tags}
