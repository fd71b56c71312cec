"""The report page: it loads and executes nothing, shows existing files, names missing ones, and escapes all text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from prunetune.errors import RunFolderError
from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.plan import Plan
from prunetune.report import write_report
from support.page import ATTACK, Outline, steering
from support.report import OPTIONAL_FILES, make_run, write_lines


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("report") / "legal")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    return (run_folder / "report.html").read_text(encoding="utf-8")


def test_headline_says_size_and_quality(page: str) -> None:
    assert "<h1>32% smaller (40% smaller decoder); mean accuracy 0.729, 93% of the dense tuned model</h1>" in page


def test_page_loads_and_executes_nothing(page: str) -> None:
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert all(target.startswith("#") for target in outline.attributes("href"))
    assert not outline.attributes("src")
    assert not [name for _, attrs in outline.tags for name in attrs if name.startswith("on")]
    assert "http://" not in page
    assert "https://" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page


def test_page_is_small_and_the_same_bytes_again(run_folder: Path, page: str) -> None:
    assert len(page.encode()) < 3_000_000
    assert write_report(run_folder).read_text(encoding="utf-8") == page
    assert {path.name for path in run_folder.iterdir()} == {
        "config.yaml", "evaluation", "manifest.json", "metrics.jsonl", "plan.json", "report.html", "validation.jsonl",
    }  # fmt: skip


def test_headings_tables_and_figures_are_accessible(page: str) -> None:
    outline = Outline(page)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))
    assert all(attrs.get("scope") for tag, attrs in outline.tags if tag == "th")
    assert all(attrs.get("role") == "img" and attrs.get("aria-label") for tag, attrs in outline.tags if tag == "svg")
    assert page.count("<caption") == page.count("<table")


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    outline = Outline(page)
    names = outline.attributes("id")
    assert len(names) == len(set(names))
    references = [target.removeprefix("#") for target in outline.attributes("href")] + re.findall(
        r"url\(#([^)]*)\)", page
    )
    assert set(references) | set(outline.attributes("aria-labelledby")) <= set(names)


def test_figures_use_page_colours_only(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == (1 + 3) + (2 + 2) + (6 + 2)  # scores, what was kept, how it went
    painted = {colour for svg in pictures for colour in re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)}
    assert all(colour.startswith("var(--") or colour in ("none", "currentColor") for colour in painted), painted


def test_table_has_every_layer(page: str, run_folder: Path) -> None:
    kept = Plan.load(run_folder / "plan.json").kept
    for layer in range(30):
        row = re.search(rf'<tr><th scope="row">{layer}</th>(.*?)</tr>', page, flags=re.DOTALL)
        assert row is not None
        assert f"{len(kept[f'model.layers.{layer}.self_attn'])} of 3" in row[1]
        assert f"{len(kept[f'model.layers.{layer}.mlp']):,} of 1,536" in row[1]


@pytest.mark.parametrize("absent", [
    *[(name,) for name in OPTIONAL_FILES],
    *[tuple(name for name in OPTIONAL_FILES if name != present) for present in OPTIONAL_FILES],
    OPTIONAL_FILES,
    ("evaluation/tuned.json", "evaluation/dense.json"),
    ("metrics.jsonl", "validation.jsonl"),
], ids=lambda absent: f"without {len(absent)}: {absent[0]}")  # fmt: skip
def test_missing_files_are_named_and_the_rest_is_shown(
    run_folder: Path, tmp_path: Path, absent: tuple[str, ...]
) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    for name in absent:
        (folder / name).unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    Outline(page)
    assert "<h1>" in page
    assert all(f"{name} is missing" in page for name in absent)


@pytest.mark.parametrize("name", OPTIONAL_FILES)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe\x00", b'{"tasks": {"a": 1}, "sites": 3}']
)
def test_broken_file_is_named(run_folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "evaluation").mkdir()
    shutil.copy(run_folder / "config.yaml", tmp_path / "config.yaml")
    (tmp_path / name).write_bytes(content)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    Outline(page)
    # Any object is a log line or a manifest, if an odd one.
    readable = content.endswith(b"}") and name.endswith((".jsonl", "manifest.json"))
    assert readable or re.search(rf"{name} (cannot be read|is empty|has \d line)", page)


def test_without_tuned_scores_the_dense_model_is_the_reference(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "evaluation" / "tuned.json").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert "mean accuracy 0.729 against 0.389 of the dense untuned model</h1>" in page
    assert "Dense, tuned</th>" not in page


def test_without_manifest_the_headline_counts_units_of_the_plan(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "manifest.json").unlink()
    assert "<h1>59% of KV groups and 51% of MLP channels kept; mean" in write_report(folder).read_text(encoding="utf-8")


def test_log_line_cut_short_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 710, "lo')
    page = write_report(folder).read_text(encoding="utf-8")
    assert "metrics.jsonl has 1 line that cannot be read" in page
    assert "Losses over steps" in page


@pytest.mark.parametrize("folder", ["absent", "empty", "file"])
def test_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="name the run folder that `prunetune run` made") as refused:
        write_report(tmp_path / folder)
    assert "\n" not in str(refused.value)


def hostile_evaluation(right: bool) -> Evaluation:
    item = Item(ATTACK, ATTACK, ATTACK, ATTACK, right, {"accuracy": float(right), ATTACK: 1.0})
    scores = {"accuracy": Score(float(right), float("nan"), 1), ATTACK: Score(float("nan"), float("nan"), 1)}
    return Evaluation({ATTACK: TaskResult(ATTACK, scores, (item,))})


def hostile(value: Any) -> Any:
    """The same structure with every text replaced."""
    if isinstance(value, dict):
        return {key: hostile(entry) for key, entry in value.items()} | {ATTACK: ATTACK}
    return ATTACK if isinstance(value, str) else value


def test_hostile_text_is_escaped(run_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run_folder, tmp_path / "run <b>&amp;")
    (folder / "config.yaml").write_text(f"model: {json.dumps(ATTACK)}\n</pre>{ATTACK}", encoding="utf-8")
    for name, right in (("dense", False), ("tuned", True), ("pruned", False)):
        (folder / "evaluation" / f"{name}.json").write_text(hostile_evaluation(right).to_json(), encoding="utf-8")
    site = f"{ATTACK}.layers.0.mlp"
    (folder / "plan.json").write_text(Plan({site: (0,)}, {site: 2}).to_json(), encoding="utf-8")
    write_lines(
        folder / "metrics.jsonl", [{"step": 1, "phase": ATTACK, "loss": 1.0, "lr": ATTACK, "kept": float("nan")}]
    )
    write_lines(folder / "validation.jsonl", [{"step": ATTACK, "phase": ATTACK, "nll": 2.0}])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(hostile(manifest)), encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    outline = Outline(page)
    assert not {tag for tag, _ in outline.tags} & {"script", "img", "b"}
    assert not [name for _, attrs in outline.tags for name in attrs if name.startswith("on")]
    assert "&lt;script&gt;" in page
    assert not steering(page)
    assert "\\x1b]0;title\\x07" in page
    assert "\N{CJK UNIFIED IDEOGRAPH-6A21}" in page


def drift_items(kinds: list[str], **scores: float) -> tuple[Item, ...]:
    return tuple(Item(f"{kind}-{index}", "", "", "", None, scores) for index, kind in enumerate(kinds))


@pytest.mark.parametrize("scores", [{}, {"kl": 0.2}, {"agreement": 0.9}, {"kl": 0.2, "agreement": 0.9}])
def test_drift_is_shown_by_kind_as_far_as_it_is_known(
    scores: dict[str, float], run_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    items = drift_items(["code", "code", ATTACK], **scores)
    means = {metric: Score(value, 0.01, 3) for metric, value in scores.items()}
    results = Evaluation({name: TaskResult(name, means, items) for name in ("pruned", ATTACK)})
    (folder / "evaluation" / "drift.json").write_text(results.to_json())
    page = write_report(folder).read_text()
    assert ATTACK not in page
    assert ('<th scope="row" class="text">code</th><td>2</td>' in page) == ("kl" in scores)
    assert ("the pruned model would choose 90% as well" in page) == ({"kl", "agreement"} <= set(scores))
