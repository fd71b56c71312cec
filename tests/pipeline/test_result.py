"""What `prunetune.run` returns: still a path, and the scores, plan, models and report behind it."""

from __future__ import annotations

import copy
import html
import json
import math
import pickle
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from prunetune import Plan, RunResult
from prunetune.errors import MissingPackage, ModelError, RunFolderError
from prunetune.evaluation.results import Evaluation
from support.finished_run import copied_run, finished_run
from support.page import ATTACK
from support.report import make_run


def test_result_is_the_path_of_the_run_folder() -> None:
    run = finished_run()
    plain = Path(str(run))
    assert (run == plain, hash(run) == hash(plain), isinstance(run, Path)) == (True, True, True)
    assert type(run / "model") is type(plain)
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"
    for again in (copy.deepcopy(run), pickle.loads(pickle.dumps(run)), RunResult(str(run))):
        assert (type(again), again) == (RunResult, run)


def test_paths_name_what_exists(tmp_path: Path) -> None:
    assert {"model", "report", "plan", "adapter", "manifest", "config"} <= set(finished_run().paths)
    assert all(path.exists() for path in finished_run().paths.values())
    assert RunResult(tmp_path).paths == {}


def test_plan_and_manifest_equal_the_files() -> None:
    run = finished_run()
    assert run.plan == Plan.load(run / "plan.json")
    assert run.manifest.to_dict() == json.loads((run / "manifest.json").read_text())


def test_scores_equal_the_evaluations_of_all_models() -> None:
    run, frame = finished_run(), finished_run().scores
    assert list(frame.columns) == ["task", "metric", "model", "value", "se", "items", "general"]
    expected = {}
    for name in ("dense", "tuned", "pruned"):
        for task, result in Evaluation.from_json((run / "evaluation" / f"{name}.json").read_text()).tasks.items():
            expected |= {(task, metric, name): score.value for metric, score in result.scores.items()}
    table = {(row.task, row.metric, row.model): row.value for row in frame.itertuples()}
    assert table == pytest.approx(expected, nan_ok=True)
    wide = frame.pivot_table(index=["task", "metric"], columns="model", values="value")
    assert wide.loc[("open", "nll"), "pruned"] == pytest.approx(expected["open", "nll", "pruned"])


def test_scores_of_a_run_without_any_have_columns_and_no_rows(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: demo\n")
    frame = RunResult(tmp_path).scores
    assert (len(frame), "metric" in frame.columns) == (0, True)


def test_scores_of_several_sizes_name_the_size(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: demo\n")
    (tmp_path / "sizes").mkdir()
    for keep in ("0.5", "0.75"):
        shutil.move(make_run(tmp_path / keep), tmp_path / "sizes" / keep)
    run = RunResult(tmp_path)
    assert {keep: type(size) for keep, size in run.sizes.items()} == {0.75: RunResult, 0.5: RunResult}
    assert list(run.sizes) == [0.75, 0.5]
    assert sorted(run.scores["keep"].unique()) == [0.5, 0.75]
    with pytest.raises(ModelError, match=r"several sizes; name one of|no model yet"):
        run.model()


def test_scores_without_pandas_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackage, match=r"needs the package pandas; run: pip install 'pandas"):
        _ = finished_run().scores


def test_models_are_those_of_the_run() -> None:
    run = finished_run()
    ids = torch.tensor([run.tokenizer()("question 3")["input_ids"]])
    logits = {name: run.model(name, device="cpu")(ids).logits for name in ("pruned", "tuned", "dense")}
    assert run.model().num_parameters() == run.manifest.pruned.params
    assert not torch.equal(logits["tuned"], logits["dense"])
    assert logits["pruned"].shape == logits["dense"].shape
    assert not any(parameter.requires_grad for parameter in run.model().parameters())


def test_model_that_the_run_lacks_is_refused_with_what_there_is(tmp_path: Path) -> None:
    run = copied_run(tmp_path)
    shutil.rmtree(run / "tuned")
    with pytest.raises(ModelError, match=r"no dense tuned model as an adapter.*use pruned or dense"):
        run.model("tuned")
    with pytest.raises(ModelError, match="name is pruned, tuned or dense"):
        run.model("base")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="dtype auto, float32"):
        run.model(dtype="int8")
    (run / "plan.json").unlink()
    with pytest.raises(RunFolderError, match=r"plan\.json is missing"):
        _ = run.plan


class Frames(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_report_is_shown_in_a_sandboxed_frame_that_holds_the_page(tmp_path: Path) -> None:
    run = copied_run(tmp_path)
    ((tag, attributes),) = Frames(run.report._repr_html_()).tags
    assert (tag, attributes["sandbox"], str(run.report)) == ("iframe", None, str(run / "report.html"))
    assert attributes["srcdoc"] == (run / "report.html").read_text()
    (run / "report.html").write_text(f'"></iframe>{ATTACK}')
    assert [tag for tag, _ in Frames(run.report._repr_html_()).tags] == ["iframe"]
    (run / "report.html").unlink()
    with pytest.raises(RunFolderError, match="write it again by write_report"):
        run.report._repr_html_()


def test_table_in_a_notebook_escapes_what_others_named(tmp_path: Path) -> None:
    run = copied_run(tmp_path)
    name = f"{ATTACK}\x1b[31m"
    for file in (run / "evaluation").glob("*.json"):
        file.write_text(file.read_text().replace('"open"', json.dumps(name)))
    page = run._repr_html_()
    assert {tag for tag, _ in Frames(page).tags} == {"p", "table", "tr", "td", "code"}
    assert "\x1b" not in page
    assert html.escape("<script>") in page
    assert "<code>" in (run.parent)._repr_html_() if isinstance(run.parent, RunResult) else True


def test_table_in_a_notebook_has_the_headline_scores() -> None:
    page = re.sub("<[^>]*>", " ", finished_run()._repr_html_())
    assert "smaller decoder" in page
    assert re.search(r"task\s+metric\s+pruned\s+recovery\s+dense tuned\s+dense", page)
    assert not math.isnan(finished_run().scores.value.iloc[0])
