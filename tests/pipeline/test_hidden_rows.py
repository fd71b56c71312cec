"""With `report.samples: off` no word of a row is in what a run, a comparison or a check writes and logs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.cli import app
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites import local
from prunetune.runs.folder import RunFolder
from support.data import write_lines
from support.endpoint import serving
from support.evaluation import characters, speaker

WORD = re.compile(rb"plant(?!s\b)[a-z0-9]+")  # a prompt of the package asks about plants
SPLITS = ("train", "search", "valid", "test", "general")
COUNT = 4


def planted_rows(split: str) -> list[dict[str, Any]]:
    """Rows of each kind, each with an id that is personal."""
    rows: list[dict[str, Any]] = []
    for n in range(COUNT):
        rows += [
            {"prompt": f"plant{split}asked{n}: ", "choices": [f"plant{split}yes", f"plant{split}no"], "answer": n % 2},
            {"prompt": f"plant{split}open{n}: ", "completion": f"plant{split}said{n}", f"plant{split}column": 1},
            {"messages": [message("user", f"plant{split}chat{n}"), message("assistant", f"plant{split}reply{n}")]},
        ]
    suffix = "-general" if split == "general" else ""
    tasks = ("choice", "open", "chat")
    return [row | {"id": f"plant{split}id{n}", "task": f"{tasks[n % 3]}{suffix}"} for n, row in enumerate(rows)]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def planted_answers(model: Any, tokenizer: Any, prompts: Sequence[Any], **_: Any) -> list[list[int]]:
    return [tokenizer("plantgenerated", add_special_tokens=False)["input_ids"]] * len(prompts)


@dataclass
class Workspace:
    """A folder with a model, planted rows and what commands made of them."""

    root: Path
    log: io.StringIO  # all that was logged and printed

    def prunetune(self, *arguments: object) -> int:
        """Run a command; its exit code."""
        handler, logger = logging.StreamHandler(self.log), logging.getLogger("prunetune")
        level = logger.level
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PRUNETUNE_CACHE", str(self.root / "cache"))
            patch.setattr("sys.argv", ["prunetune", *map(str, arguments)])
            patch.setattr(local, "generate_ids", planted_answers)
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
            try:
                with contextlib.redirect_stdout(self.log), contextlib.redirect_stderr(self.log):
                    return app._run_app()
            except SystemExit as ended:
                return int(ended.code or 0)
            finally:
                logger.removeHandler(handler)
                logger.setLevel(level)

    def recipe(self, name: str, **changes: Any) -> Path:
        """A recipe of two steps that reads every split."""
        data = {split: f"{split}.jsonl" for split in (*SPLITS, "guard")}
        values = {
            "model": "dense",
            "device": "cpu",
            "data": {**data, "distill_texts": "texts.jsonl", "bad_rows": "drop", "template": "raw"},
            "budget": {"align": 8},
            "train": {"steps": 2, "batch_size": 2, "validate_every": 1},
            "search": {"init_batches": 1},
            "limits": ["guard.nll <= 9x -> stop"],
            "evaluate": {"max_new_tokens": 4},
            "report": {"samples": False},  # as YAML reads a bare off
            "report_to": ["tensorboard"],
        }
        file = self.root / name
        file.write_text(yaml.safe_dump(values | changes))
        return file

    def words(self, *names: str) -> set[str]:
        """The planted words in these files and folders and in the log."""
        files = [
            file for name in names for file in (self.root / name, *(self.root / name).rglob("*")) if file.is_file()
        ]
        assert files
        contents = [file.read_bytes() for file in files] + [self.log.getvalue().encode()]
        return {word.decode() for content in contents for word in WORD.findall(content)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A finished run with samples off, a suite, and the log of the run."""
    root = tmp_path_factory.mktemp("hidden")
    speaker().save_pretrained(root / "dense")
    characters().save_pretrained(root / "dense")
    for split in SPLITS:
        unusable = {"prompt": f"plant{split}odd", "choices": [f"plant{split}same"] * 2}
        write_lines(root / f"{split}.jsonl", *planted_rows(split), unusable)
    for split in ("texts", "guard"):
        write_lines(root / f"{split}.jsonl", *({"text": f"plant{split}text{n} a b c"} for n in range(COUNT)))
    rows = planted_rows("suite")
    for n, task in enumerate(("choice", "open")):
        write_lines(root / f"{task}.jsonl", *rows[n::3])
    write_lines(root / "broken.jsonl", {"prompt": "a", "choices": ["plantsame", "plantsame"], "answer": 0})
    tasks = {
        "choice": {"data": "choice.jsonl", "scorer": "accuracy"},
        "open": {"data": "open.jsonl", "scorer": ["exact_match", {"contains": {"any": ["generated"]}}]},
        "broken": {"data": "broken.jsonl", "scorer": "accuracy"},
    }
    (root / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    workspace = Workspace(root, io.StringIO())
    assert workspace.prunetune("run", workspace.recipe("recipe.yaml"), "--out", root / "runs" / "a") == 0
    return workspace


@pytest.fixture
def fresh_log(workspace: Workspace) -> Workspace:
    """The workspace with an empty log."""
    return replace(workspace, log=io.StringIO())


def test_no_word_of_a_row_is_in_the_run_folder_the_history_the_cache_or_the_log(workspace: Workspace) -> None:
    assert not workspace.words("runs")
    log = workspace.log.getvalue()
    for split in SPLITS:
        line = 3 * COUNT + 1
        assert f"data.{split} leaves bad rows out: {workspace.root / split}.jsonl:{line}: [hidden]" in log
    assert "not used: other columns (4 rows)" in log


def test_scores_of_hidden_rows_are_kept_item_by_item(workspace: Workspace) -> None:
    folder = RunFolder(workspace.root / "runs" / "a")
    for name in ("dense", "tuned", "pruned"):
        evaluation = Evaluation.from_json(folder.evaluation_file(name).read_text())
        assert set(evaluation.tasks) == {
            f"{task}{suffix}" for task in ("choice", "open", "chat") for suffix in ("", "-general")
        }
        items = evaluation.tasks["choice"].items
        assert {item.id for item in items} == {f"test.jsonl:{3 * n + 1}" for n in range(COUNT)}
        assert {item.expected for item in items} == {"[hidden] answer 1", "[hidden] answer 2"}
        assert all((item.got == item.expected) == item.correct for item in items)
        assert {item.got for item in evaluation.tasks["open"].items} == {"[hidden]"}


def test_resumed_run_cannot_change_what_is_shown(fresh_log: Workspace) -> None:
    run = fresh_log.root / "runs" / "a"
    assert (
        fresh_log.prunetune("run", fresh_log.root / "recipe.yaml", "--out", run, "--resume", "--report.samples", "on")
        == 2
    )
    assert "report.samples" in fresh_log.log.getvalue()


def test_report_counts_flips_and_shows_no_row(workspace: Workspace) -> None:
    page = (workspace.root / "runs" / "a" / "report.html").read_text()
    assert "Rows are not shown (report.samples: off). Of 24 test items that both models answered" in page
    assert "[hidden]" not in page


def test_no_word_of_a_row_is_in_a_comparison(fresh_log: Workspace) -> None:
    methods = [text for name in ("untuned", "wanda-sp") for text in ("--compare.methods", name)]
    assert (
        fresh_log.prunetune("compare", fresh_log.recipe("compare.yaml"), "--out", fresh_log.root / "cmp", *methods) == 0
    )
    assert not fresh_log.words("cmp")
    cell = json.loads(next((fresh_log.root / "cmp" / "cells").glob("wanda*")).read_text())
    assert sorted(cell["items"]["choice"]["id"]) == sorted(f"test.jsonl:{3 * n + 1}" for n in range(COUNT))


def test_eval_and_check_of_the_run_hide_rows_as_its_recipe_says(fresh_log: Workspace) -> None:
    root, out = fresh_log.root, fresh_log.root / "off"
    out.mkdir()
    options = ("--suite", root / "suite.yaml", "--device", "cpu")
    run = root / "runs" / "a"
    assert fresh_log.prunetune("eval", run, *options, "--out", out / "scores.json") == 2  # a task is broken
    against = root / "clear.json"
    right = Evaluation.from_json((out / "scores.json").read_text())
    for name, flags in (("again", ("--against", out / "scores.json")), ("dense", ())):
        files = ("--junit", out / f"{name}.xml", "--html", out / f"{name}.html", "--json", out / f"{name}.json")
        assert fresh_log.prunetune("check", run, *options, *files, *flags) in (1, 2)
    assert right.tasks["open"].scores["contains"].value == 1
    assert json.loads((out / "again.json").read_text())["scores"]["choice"]
    assert not fresh_log.words("off", "cache")
    assert fresh_log.prunetune("eval", run, *options, "--samples", "on", "--out", out / "scores.json") == 2
    assert not fresh_log.words("off", "cache")
    for model in (run / "model", run / "tuned" / "adapter"):  # named alone
        assert fresh_log.prunetune("eval", model, *options, "--out", out / "model.json") == 2
        assert not fresh_log.words("off", "cache")
    # The same model outside its run, to see that there is something to hide.
    shutil.copytree(run / "model", root / "outside")
    assert fresh_log.prunetune("eval", root / "outside", *options, "--out", against) == 2
    words = fresh_log.words("clear.json", "cache")
    assert {"plantsuiteasked0", "plantsuiteyes", "plantsuiteid0", "plantgenerated", "plantsame"} <= words
    clear = Evaluation.from_json(against.read_text())
    assert {name: task.scores for name, task in clear.tasks.items()} == {
        name: task.scores for name, task in right.tasks.items()
    }


@pytest.mark.parametrize("samples", ["on", "off"])
def test_listing_of_new_failures_names_lines_where_rows_are_hidden(fresh_log: Workspace, samples: str) -> None:
    root, folder = fresh_log.root, fresh_log.root / f"listed-{samples}"
    folder.mkdir()
    suite = ("--suite", root / "suite.yaml", "--device", "cpu", "--samples", samples)
    assert fresh_log.prunetune("eval", root / "dense", *suite, "--out", folder / "scores.json") == 2
    values = json.loads((folder / "scores.json").read_text())
    for task, metric in (("open", "exact_match"), ("choice", "accuracy")):
        for item in values["tasks"][task]["items"]:
            item |= {"correct": True, "scores": item["scores"] | {metric: 1.0}}
    (folder / "before.json").write_text(json.dumps(values))
    fresh_log.prunetune(
        "check", root / "dense", *suite, "--against", folder / "before.json", "--junit", folder / "junit.xml"
    )
    junit, log = (folder / "junit.xml").read_text(), fresh_log.log.getvalue()
    if samples == "off":
        assert not fresh_log.words(folder.name)
        assert "open.jsonl:1\n  asked: [hidden]" in junit
        assert "open / open.jsonl:1" in log
    else:
        assert {"plantsuiteopen0", "plantsuiteid1", "plantsuitesaid0"} <= fresh_log.words(f"{folder.name}/junit.xml")


@pytest.mark.parametrize("samples", ["on", "off"])
def test_reply_of_a_server_that_repeats_the_prompt_is_quoted_only_where_rows_are_shown(
    fresh_log: Workspace, samples: str
) -> None:
    def refuse(path: str, body: dict[str, Any]) -> bytes:
        return f"no {json.dumps(body['prompt'])}".encode()

    out = fresh_log.root / f"server-{samples}.json"
    with serving(refuse) as server:
        options = ("--suite", fresh_log.root / "suite.yaml", "--samples", samples, "--model-name", "m", "--out", out)
        assert fresh_log.prunetune("eval", server.url, *options) == 2
    assert bool(fresh_log.words(out.name)) == (samples == "on")
    assert "did not reply with JSON: " in out.read_text()


def test_error_of_rows_that_stop_a_run_names_their_lines_only(fresh_log: Workspace) -> None:
    root = fresh_log.root
    recipe = fresh_log.recipe("strict.yaml", data={"train": "train.jsonl"}, limits=[])
    assert fresh_log.prunetune("run", recipe, "--out", root / "strict") == 2
    log = fresh_log.log.getvalue()
    assert f"{root / 'train.jsonl'}:13: [hidden] (1 of 13 rows cannot be used" in log
    assert "samples off hides" in log
    assert not WORD.search(log.encode())
    assert fresh_log.prunetune("run", recipe, "--out", root / "strict", "--report.samples", "on") == 2
    assert "planttrainsame" in fresh_log.log.getvalue()


def test_redacted_matches_are_in_no_score_file_and_no_error(fresh_log: Workspace) -> None:
    root, out = fresh_log.root, fresh_log.root / "redacted.json"
    options = ("--suite", root / "suite.yaml", "--device", "cpu", "--redact", r"plant\w+")
    assert fresh_log.prunetune("eval", root / "dense", *options, "--out", out) == 2
    assert not fresh_log.words(out.name)
    items = Evaluation.from_json(out.read_text()).tasks["choice"].items
    assert {item.prompt for item in items} == {"[redacted]: "}
    assert len({item.id for item in items}) == COUNT
    assert "choices has '[redacted]' twice" in fresh_log.log.getvalue()
