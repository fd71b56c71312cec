"""Laws of paths in a recipe: they start from its folder, whatever the working folder; flags start from the latter."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.config.recipe import RunConfig, load_recipe
from prunetune.data.sources import read_records
from prunetune.errors import ConfigError
from support.data import pairs, write_lines


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows and a model folder, beside the working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_lines(tmp_path / "project" / "data" / "rows.jsonl", *pairs(3))
    (tmp_path / "project" / "dense").mkdir()
    return tmp_path / "project"


def read(project: Path, changes: dict[str, Any] | None = None, **values: Any) -> RunConfig:
    (project / "recipe.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(Path(os.path.relpath(project / "recipe.yaml")), changes)


@pytest.mark.parametrize("source", ["data/rows.jsonl", "./data/rows.jsonl", "data/*.jsonl", "data/rows.jsonl*2"])
def test_sources_start_from_the_folder_of_the_recipe(source: str, project: Path) -> None:
    for form in (source, [source], {"source": source}, [{"source": source, "weight": 1}]):
        config = read(project, data={"train": form})
        assert len(read_records(config.data.train, config.data, "train")) == 3


def test_source_starts_from_a_folder_with_pattern_signs_in_its_name(project: Path) -> None:
    odd = project.rename(project.with_name("a[b]*"))
    config = read(odd, data={"train": ["data/*.jsonl"], "valid": "data/rows.jsonl"})
    assert len(read_records((*config.data.train, *config.data.valid), config.data, "train")) == 6


def test_model_root_and_other_files_start_from_the_folder_of_the_recipe(project: Path) -> None:
    (project / "table.json").touch()
    config = read(
        project,
        model="dense",
        data={"root": "data", "train": "rows.jsonl"},
        budget={"table": "table.json"},
        compare={"variants": "absent.yaml"},
    )
    assert len(read_records(config.data.train, config.data, "train")) == 3
    for path, name in ((config.model, "dense"), (config.budget.table, "table.json")):
        assert Path(path).resolve() == project / name
    assert config.compare.variants == "../project/absent.yaml", "an error names where it was looked for"


@pytest.mark.parametrize("name", ["demo", "gpt2", "owner/name", "Qwen/Qwen2.5-0.5B", "owner/name@v1.0"])
def test_names_that_are_no_paths_stay(name: str, project: Path) -> None:
    assert read(project, model=name, data={"train": ["demo*2", "owner/rows:en@train"]}, out="runs/x") == load_recipe(
        project / "recipe.yaml"
    )
    config = load_recipe(project / "recipe.yaml")
    assert (config.model, config.data.train, config.out) == (name, ("demo*2", "owner/rows:en@train"), "runs/x")


def test_absent_file_is_named_where_the_recipe_would_have_it(project: Path) -> None:
    assert read(project, data={"train": "data/absent.jsonl"}).data.train == ("../project/data/absent.jsonl",)


def test_file_of_the_working_folder_is_taken_with_a_warning(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(Path("old.jsonl"), *pairs(2))
    with caplog.at_level(logging.WARNING):
        config = read(project, data={"train": ["old.jsonl", "data/rows.jsonl"]})
    assert config.data.train == ("old.jsonl", "../project/data/rows.jsonl")
    assert [record.getMessage() for record in caplog.records] == [
        "data.train: old.jsonl was found in the working folder, not in the recipe's: the next version looks in "
        "../project only"
    ]


def test_flags_start_from_the_working_folder(project: Path) -> None:
    write_lines(Path("rows.jsonl"), *pairs(2))
    changes = {"data": {"train": ["rows.jsonl"]}, "model": "dense"}
    config = read(project, changes, data={"train": "data/rows.jsonl", "test": "data/rows.jsonl"})
    assert (config.model, config.data.train) == ("dense", ("rows.jsonl",))
    assert config.data.test == ("../project/data/rows.jsonl",)
    rooted = read(project, {"data": {"root": str(project / "data")}}, data={"train": "rows.jsonl"})
    assert rooted.data.train == ("rows.jsonl",), "sources start from the root that is given"


def test_recipe_of_a_run_folder_is_read_as_the_run_wrote_it(project: Path) -> None:
    (project / "manifest.json").write_text("{}")
    (project / "config.yaml").write_text("data: {train: data/rows.jsonl}")
    assert load_recipe(project / "config.yaml").data.train == ("data/rows.jsonl",)


@pytest.mark.parametrize("data", ["train", ["train"], None, {"train": 5}, {"train": [None]}])
def test_sections_that_are_none_stay_errors_of_one_line(data: Any, project: Path) -> None:
    with pytest.raises(ConfigError, match="data"):
        read(project, data=data)
