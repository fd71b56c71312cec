"""Laws of a run folder: records that will be done again are dropped, and a changed recipe is refused in one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from prunetune.config.recipe import from_mapping, to_mapping
from prunetune.errors import ModelError, RunFolderError
from prunetune.model.loading import resolve_model_path
from prunetune.report.run_folder import read_run
from prunetune.runs.folder import RunFolder, check_folder, open_run, write_recipe


def test_dropping_records_keeps_earlier_steps_and_survives_odd_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (0, 1, 2, 3):
        folder.append_record("metrics.jsonl", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": "2"}\n{"loss": 1}\n[2]\n{"step": 1')
    folder.drop_records_after(2)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0}, {"step": 1}, {"step": 2}]
    folder.drop_records_after(-1)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == ""


def test_changed_option_that_the_first_version_did_not_have_is_called_new(tmp_path: Path) -> None:
    """A run of 0.1.0 has no `search.method`, and retired options: those are dropped without a word."""
    values = to_mapping(from_mapping({"out": str(tmp_path / "run"), "train": {"learning_rate": 2e-3}}))
    del values["search"]["method"]
    values["search"]["anneal"], values["train"]["weights_rate"] = 0.6, 2e-3
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    config = from_mapping({"out": str(tmp_path / "run"), "train": {"learning_rate": 2e-3}})
    check_folder(config, resume=True)
    changed = replace(config, search=replace(config.search, method="generator"), seed=3)
    with pytest.raises(RunFolderError) as refused:
        check_folder(changed, resume=True)
    line = str(refused.value)
    assert "seed was 0 and is now 3" in line
    assert "search.method, which the version that began the run did not have, is now 'generator'" in line
    assert "\n" not in line


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "tuned/adapter/adapter_config.json"])
def test_folder_with_a_pipe_is_refused_by_every_opener_and_none_waits(name: str, tmp_path: Path) -> None:
    """A reader of a pipe waits for ever; a link to a device is no better."""
    config, path = from_mapping({"out": str(tmp_path / "run")}), tmp_path / "run"
    path.mkdir()
    write_recipe(RunFolder(path), config)
    (path / "config.json").write_text("{}")  # so that it could be a model, too
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    for error, opens in (
        (RunFolderError, lambda: check_folder(config, resume=True)),
        (RunFolderError, lambda: open_run(path)),
        (RunFolderError, lambda: read_run(path)),
        (ModelError, lambda: resolve_model_path(str((path / name).parent))),
    ):
        with pytest.raises(error, match=r"is a pipe or a device|no run folder"):
            opens()
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is a pipe or a device"):
        resolve_model_path(str((path / name).parent))
