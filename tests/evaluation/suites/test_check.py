"""A check fails if a limit is broken, lists the right items, and never passes a task that it could not judge."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from peft import LoraConfig, get_peft_model

from prunetune.evaluation.results import Evaluation, Item, Score, TaskResult
from prunetune.evaluation.suites import evaluate_suite, parse_suite
from prunetune.evaluation.suites.check import CheckResult, check_limits
from prunetune.evaluation.suites.junit import render_junit
from prunetune.evaluation.suites.output import render_check, render_evaluation
from prunetune.evaluation.suites.suite import Suite
from prunetune.export.gguf.write import write_gguf as write_gguf
from prunetune.export.source import ExportSource
from prunetune.model.adapter_folder import write_adapter_folder
from prunetune.model.provenance import ModelIdentity
from support.data import subwords, write_lines
from support.evaluation import speaker
from support.export import WIDE, plan_of, run_folder
from support.models import tiny
from support.suites import ScriptedBackend, model_folder, suite_file, suite_in

DATA: dict[str, Any] = {"data": "x.jsonl", "scorer": "accuracy"}


def answers(right: str, metric: str = "accuracy", task: str = "t") -> TaskResult:
    """One item for each letter: "1" is right, "0" is wrong."""
    items = tuple(
        Item(f"i{index}", f"ask {index}", "yes", "yes" if sign == "1" else "no", sign == "1", {metric: float(sign)})
        for index, sign in enumerate(right)
    )
    share = right.count("1") / len(right)
    return TaskResult(task, {metric: Score(share, 0.1, len(right))}, items)


def graded(values: list[float], metric: str = "rouge_l") -> TaskResult:
    items = tuple(
        Item(f"i{index}", "ask", "want", f"{value}", None, {metric: value, "nll": value, "tokens": 2.0})
        for index, value in enumerate(values)
    )
    return TaskResult("t", {metric: Score(sum(values) / len(values), 0.1, len(values))}, items)


def check_task(mine: TaskResult, theirs: TaskResult | None, limits: Any = None, **keys: Any) -> CheckResult:
    scripted = {**DATA, "scorer": "rouge"} if "rouge_l" in mine.scores else DATA
    suite = parse_suite({"tasks": {"t": {**scripted, **({"limits": limits} if limits else {})}}, **keys})
    return check_limits(Evaluation({"t": mine}), Evaluation({"t": theirs}) if theirs else None, suite)


@pytest.mark.parametrize(
    ("limits", "breaks"),
    [
        ({"min": 0.5}, False),
        ({"min": 0.51}, True),
        ({"max": 0.5}, False),
        ({"max": 0.49}, True),
        ({"relative": 0.6}, False),
        ({"relative": 0.7}, True),
        ({"drop": 0.3}, False),
        ({"drop": 0.2}, True),
        ({"statistical": True}, False),  # 2 of 8 is no evidence
        ({"min": 0.1, "relative": 0.9}, True),
    ],
)
def test_limit_holds_up_to_its_bound(limits: dict[str, Any], breaks: bool) -> None:
    result = check_task(answers("11110000"), answers("11111100"), limits)
    assert bool(result.broken) is breaks
    assert result.exit_code == int(breaks)


def test_limits_on_perplexity_take_lower_as_better() -> None:
    worse, better = (
        TaskResult("t", {"perplexity": Score(value, 0.1, 3)}, graded([math.log(value)] * 3).items)
        for value in (20.0, 10.0)
    )
    suite = parse_suite({"tasks": {"t": {"data": "x", "scorer": "perplexity", "limits": {"relative": 0.6, "drop": 9}}}})
    first, second = Evaluation({"t": worse}), Evaluation({"t": better})
    assert [verdict.broken for verdict in check_limits(first, second, suite).verdicts] == [True, True]
    assert [verdict.broken for verdict in check_limits(second, first, suite).verdicts] == [False, False]


def test_without_limits_a_task_must_not_be_significantly_worse() -> None:
    assert check_task(answers("1" * 20 + "0" * 20), answers("1" * 40)).broken
    assert not check_task(answers("1" * 39 + "0"), answers("1" * 40)).broken
    assert not check_task(answers("1" * 40), answers("1" * 20 + "0" * 20)).broken  # better is not worse


def test_task_without_limits_is_not_judged_without_a_reference() -> None:
    result = check_task(answers("10"), None)
    assert (result.verdicts, result.errors, result.exit_code) == ((), {}, 0)


@pytest.mark.parametrize(
    ("lost", "said"), [(0, "p 1.0000"), (7, "p 0.0156"), (14, "p 0.0001"), (15, "p < 0.0001"), (40, "p < 0.0001")]
)
def test_p_value_is_said_in_four_digits_and_is_never_zero(lost: int, said: str) -> None:
    """That of `lost` changed items, none of which the model gained, is twice 0.5 ** lost."""
    (verdict,) = check_task(answers("0" * lost + "1" * 40), answers("1" * (lost + 40)), correction="none").verdicts
    assert verdict.says.endswith(f"{said})")


def test_many_tests_are_corrected_for_each_other() -> None:
    """Seven lost of seven: p = 0.016, which one test alone would call significant, and the first of ten would not."""
    worse, same = answers("0" * 7 + "1" * 30), answers("1" * 37)
    tasks = {f"t{index}": DATA for index in range(10)}
    mine = Evaluation({name: replace(same, task=name) for name in tasks} | {"t0": replace(worse, task="t0")})
    theirs = Evaluation({name: replace(same, task=name) for name in tasks})
    assert not check_limits(mine, theirs, parse_suite({"tasks": tasks})).broken
    (broken,) = check_limits(mine, theirs, parse_suite({"tasks": tasks, "correction": "none"})).broken
    assert broken.p == pytest.approx(2 * 0.5**7)
    assert check_limits(Evaluation({"t0": mine.tasks["t0"]}), theirs, parse_suite({"tasks": tasks})).broken


def test_new_failures_are_those_that_were_right_before() -> None:
    result = check_task(answers("0110"), answers("1101"))
    assert [failure.id for failure in result.failures] == ["i0", "i3"]
    first = result.failures[0]
    assert (first.prompt, first.expected, first.before, first.after, first.lost) == ("ask 0", "yes", "yes", "no", 1.0)
    assert check_task(answers("1111"), answers("0000")).failures == ()


def test_new_failures_of_graded_items_are_the_worst() -> None:
    result = check_task(graded([0.5, 0.1, 0.9, 0.3]), graded([0.5, 0.9, 0.8, 0.4]))
    assert [failure.id for failure in result.failures] == ["i1", "i3"]
    assert result.failures[0].lost == pytest.approx(0.8)
    many = check_task(graded([0.0] * 30), graded([n / 30 for n in range(30)]))
    assert len(many.failures) == 10
    assert many.failures[0].id == "i29"


def test_new_failures_of_graded_items_show_both_scores() -> None:
    result = check_task(graded([0.5, 0.125]), graded([0.5, 0.75]))
    (failure,) = result.failures
    assert (failure.metric, failure.score_before, failure.score_after) == ("rouge_l", 0.75, 0.125)
    for listed in (render_check(result), render_junit(result)):
        assert "rouge_l 0.75 before, 0.125 after" in listed
    (text,) = check_task(graded([3.5], "perplexity"), graded([1.5], "perplexity")).failures
    assert text.score_change == "nll 1.5 before, 3.5 after"  # an item has no perplexity of its own
    assert "scored" not in render_check(check_task(answers("0"), answers("1")))  # its two answers say it


def test_task_that_cannot_be_judged_does_not_pass() -> None:
    fine = answers("1111")
    failed = TaskResult("t", {}, (), error="the server is down")
    assert check_task(failed, fine).exit_code == 2
    assert check_task(fine, failed).errors == {"t": "the reference: the server is down"}
    assert "needs a reference" in check_task(fine, None, {"relative": 0.9}).errors["t"]
    assert check_task(fine, None, {"min": 0.5}).exit_code == 0
    nothing = check_limits(
        Evaluation({}), Evaluation({}), parse_suite({"tasks": {"t": {**DATA, "limits": {"min": 0.5}}}})
    )
    assert nothing.exit_code == 2
    others = TaskResult("t", fine.scores, tuple(replace(item, id=f"x{item.id}") for item in fine.items))
    assert "no item has accuracy in both" in check_task(fine, others, {"statistical": True}).errors["t"]
    nan = TaskResult("t", {"accuracy": Score(math.nan, math.nan, 4)}, fine.items)
    for limits in ({"min": 0.5}, {"statistical": True}, {"relative": 0.5}):
        assert check_task(nan, fine, limits).exit_code == 1
    broken_reference = check_task(fine, nan, {"relative": 0.5})
    assert broken_reference.exit_code != 0


def inserted(suite: Suite, path: Path, *, at: int) -> tuple[Evaluation, Evaluation]:
    """Results of 40 rows without ids after a row was inserted, and saved results from before."""
    rows = [{"prompt": f"case {n}", "choices": ["yes", "no"], "answer": n % 3 % 2} for n in range(40)]
    write_lines(path, *rows)
    kept = Evaluation.from_json(evaluate_suite(ScriptedBackend(), suite).to_json())
    write_lines(path, *rows[:at], {"prompt": "case 1000", "choices": ["yes", "no"], "answer": 0}, *rows[at:])
    return evaluate_suite(ScriptedBackend(), suite), kept


@pytest.mark.parametrize("limits", [None, {"statistical": True}, {"relative": 0.9}, {"drop": 0.5}])
def test_reference_of_other_rows_is_refused(tmp_path: Path, limits: Any) -> None:
    scripted = {"data": "rows.jsonl", "scorer": "accuracy", **({"limits": limits} if limits else {})}
    suite = suite_in(tmp_path, {"t": scripted})
    current, saved = inserted(suite, tmp_path / "rows.jsonl", at=0)
    result = check_limits(current, saved, suite)
    assert (result.exit_code, result.verdicts, result.failures) == (2, (), ())
    assert "evaluate the reference anew, and give rows an" in result.errors["t"]
    assert "\n" not in result.errors["t"]


def test_moved_rows_are_no_new_failures(tmp_path: Path) -> None:
    """A new failure is the same question, right before and wrong now; a limit `min` needs no reference."""
    suite = suite_in(tmp_path, {"t": {"data": "rows.jsonl", "scorer": "accuracy", "limits": {"min": 0.5}}})
    current, saved = inserted(suite, tmp_path / "rows.jsonl", at=30)
    wrong = replace(current.tasks["t"], items=tuple(replace(item, correct=False) for item in current.tasks["t"].items))
    result = check_limits(Evaluation({"t": wrong}), saved, suite)
    assert result.exit_code == 0
    before = {item.id: item.prompt for item in saved.tasks["t"].items}
    assert {(failure.id, failure.prompt) for failure in result.failures} <= set(before.items())
    assert len(result.failures) == 30


def test_limit_without_a_reference_is_judged_whatever_rows_the_reference_has(tmp_path: Path) -> None:
    suite = suite_in(tmp_path, {"t": {"data": "rows.jsonl", "scorer": "accuracy", "limits": {"min": 0.5, "max": 1}}})
    current, saved = inserted(suite, tmp_path / "rows.jsonl", at=0)
    result = check_limits(current, saved, suite)
    assert ([verdict.broken for verdict in result.verdicts], result.errors) == ([False, False], {})


def test_limits_of_a_group_hold_for_its_tasks() -> None:
    suite = parse_suite({"tasks": {"g": {"lm_eval": "group", "limits": {"accuracy": {"min": 0.5}}}}})
    result = check_limits(Evaluation({"g/a": answers("1", task="g/a"), "g/b": answers("0", task="g/b")}), None, suite)
    assert [verdict.broken for verdict in result.verdicts] == [False, True]


def test_limits_of_a_task_hold_for_no_other() -> None:
    """A task named `legal/hard` is neither limited by `legal` nor accepted as a result of it."""

    def limited(least: float, **scripted: Any) -> dict[str, Any]:
        return {**(scripted or DATA), "limits": {"accuracy": {"min": least}}}

    suite = parse_suite({"tasks": {"legal": limited(0.9), "legal/hard": limited(0.3)}})
    easy, hard = answers("1", task="legal"), answers("10", task="legal/hard")
    result = check_limits(Evaluation({"legal": easy, "legal/hard": hard}), None, suite)
    assert [(verdict.limit.task, verdict.limit.bound) for verdict in result.verdicts] == [
        ("legal", 0.9),
        ("legal/hard", 0.3),
    ]
    assert result.exit_code == 0
    assert "not among the results" in check_limits(Evaluation({"legal/hard": hard}), None, suite).errors["legal"]
    alone = parse_suite({"tasks": {"legal": limited(0.9)}})  # and results hold a task of another suite
    assert len(check_limits(Evaluation({"legal": easy, "legal/hard": hard}), None, alone).verdicts) == 1
    groups = parse_suite(
        {"tasks": {"g": limited(0.9, lm_eval="g"), "g/own": limited(0.3), "g/h": limited(0.2, lm_eval="h")}}
    )
    names = ("g/a", "g/own", "g/h/a")
    result = check_limits(Evaluation({name: answers("1", task=name) for name in names}), None, groups)
    assert [(verdict.limit.task, verdict.limit.bound) for verdict in result.verdicts] == list(
        zip(names, (0.9, 0.3, 0.2), strict=True)
    )
    assert not result.errors


def test_junit_has_verdicts_failures_and_errors() -> None:
    mine = answers("0" * 20)
    unprintable = replace(mine, items=(replace(mine.items[0], got="\x00\x1b[31m <b>&\ud800"), *mine.items[1:]))
    result = check_task(unprintable, answers("1" * 20), {"min": 0.5, "max": 2})
    root = ElementTree.fromstring(render_junit(result))
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("2", "1", "0")
    cases = root.findall(".//testcase")
    assert [case.get("name") for case in cases] == ["accuracy min 0.5", "accuracy max 2"]
    (failure,) = root.findall(".//failure")
    assert failure.text is not None
    assert failure.text.startswith("20 new failures\ni0\n  asked: ask 0\n  expected: yes\n  before: yes\n  after: ")
    assert "<b>&" in failure.text
    errors = ElementTree.fromstring(render_junit(check_task(TaskResult("t", {}, (), error="down"), answers("1"))))
    assert [case.find("error") is not None for case in errors.findall(".//testcase")] == [True]


def test_check_json_is_complete_and_has_no_nan() -> None:
    result = check_task(answers("0" * 20), answers("1" * 20), {"min": 0.5})
    data = json.loads(result.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert (data["format"], data["ok"], len(data["failures"])) == ("prunetune-check-1", False, 20)
    assert data["verdicts"][0]["limit"] == {"task": "t", "metric": "accuracy", "kind": "min", "bound": 0.5}
    assert "BROKEN  t: accuracy is 0, at least 0.5 is required" in render_check(result)


def test_check_json_says_ok_where_the_exit_code_is_0() -> None:
    for mine, ok in ((answers("1"), True), (answers("0"), False), (TaskResult("t", {}, (), error="down"), False)):
        result = check_task(mine, None, {"min": 0.5})
        assert json.loads(result.to_json())["ok"] is (result.exit_code == 0) is ok


def test_check_json_has_text_as_it_is() -> None:
    (item,) = answers("0").items
    mine = replace(answers("0"), items=(replace(item, got="größer"),))
    assert "größer" in check_task(mine, answers("1")).to_json()


def test_planted_regression_is_caught_with_its_items(tmp_path: Path) -> None:
    suite = suite_in(tmp_path, {"organ": {"data": "chosen.jsonl", "scorer": "accuracy"}})
    wrong = [f"c{n}" for n in range(7)]
    result = check_limits(
        evaluate_suite(ScriptedBackend(wrong=wrong), suite), evaluate_suite(ScriptedBackend(), suite), suite
    )
    assert result.exit_code == 1
    assert {failure.id for failure in result.failures} == set(wrong)


# -- the command line ----------------------------------------------------------------------------------------------

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(say: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """The command line with an empty cache."""
    monkeypatch.setenv("PRUNETUNE_CACHE", str(tmp_path / "cache"))
    return say


TASKS: dict[str, Any] = {"organ": {"data": "chosen.jsonl", "scorer": "accuracy", "limits": {"relative": 1.0}}}


def test_model_passes_against_itself_and_its_saved_results(tmp_path: Path, say: Said) -> None:
    model, suite = model_folder(tmp_path / "model"), suite_file(tmp_path, TASKS)
    code, out, _ = say("eval", model, "--suite", suite, "--out", tmp_path / "kept.json", "--device", "cpu")
    assert code == 0
    assert "organ" in out
    assert json.loads((tmp_path / "kept.json").read_text())["model"] == str(model)
    for against in (model, tmp_path / "kept.json"):
        code, out, _ = say("check", model, "--suite", suite, "--against", against, "--device", "cpu")
        assert (code, "holds" in out) == (0, True)


def test_unwritable_output_is_refused_before_scoring(
    tmp_path: Path, say: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    suite = suite_file(tmp_path, TASKS)
    code, out, err = say("eval", tmp_path / "no-model", "--suite", suite, "--out", tmp_path / "kept.json")
    assert (code, out) == (2, "")
    assert "kept.json: its folder cannot be written to; name a file in another one" in err


def test_worse_model_exits_1_with_reports(tmp_path: Path, say: Said) -> None:
    suite = suite_file(tmp_path, TASKS)
    for name, scripted in (("old", ScriptedBackend()), ("new", ScriptedBackend(wrong=["c3"]))):
        (tmp_path / f"{name}.json").write_text(evaluate_suite(scripted, suite_in(tmp_path, TASKS)).to_json())
    flags = ("--junit", tmp_path / "c.xml", "--json", tmp_path / "c.json")
    code, out, err = say("check", tmp_path / "new.json", "--suite", suite, "--against", tmp_path / "old.json", *flags)
    assert code == 1
    assert "organ / c3" in out
    assert "1 of 1 limits broken" in err
    assert ElementTree.parse(tmp_path / "c.xml").getroot().get("failures") == "1"
    written = json.loads((tmp_path / "c.json").read_text())
    assert [failure["id"] for failure in written["failures"]] == ["c3"]
    printed = say("check", tmp_path / "new.json", "--suite", suite, "--against", tmp_path / "old.json", "--json", "-")[
        1
    ]
    assert json.loads(printed) == written


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_run_is_checked_against_its_dense_tuned_model_or_its_untuned_one(tmp_path: Path, say: Said) -> None:
    dense, run = model_folder(tmp_path / "dense"), tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": str(dense), "layout": "uniform"}))
    suite = suite_file(tmp_path, TASKS)
    code, _, err = say("check", run, "--suite", suite, "--device", "cpu")
    assert (code, "has no model yet" in err) == (2, True)
    model_folder(run / "model")
    code, out, _ = say("check", run, "--suite", suite, "--device", "cpu")
    assert code == 0
    assert out.startswith("reference: the untuned dense model: the run has no tuned one")
    adapted: Any = get_peft_model(speaker(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    write_adapter_folder(adapted.base_model.model, run / "tuned" / "adapter", str(dense))
    out = say("check", run, "--suite", suite, "--device", "cpu")[1]
    assert out.startswith("reference: the dense model, tuned on the run's data (")


def test_run_is_not_checked_against_a_base_that_changed(tmp_path: Path, say: Said) -> None:
    dense, run = model_folder(tmp_path / "dense"), tmp_path / "run"
    model_folder(run / "model")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": str(dense), "layout": "uniform"}))
    identity = dict(ModelIdentity(str(dense)).digests)
    (run / "manifest.json").write_text(json.dumps({"model": {"identity": identity}}))
    flags = ("--suite", suite_file(tmp_path, TASKS), "--device", "cpu")
    assert say("check", run, *flags)[0] == 0
    model_folder(dense, seed=1)
    code, out, err = say("check", run, *flags)
    assert (code, out) == (2, "")
    assert "its dense model changed since (model.safetensors changed): put it back, or name one by --against" in err
    assert say("check", run, *flags, "--against", dense)[0] == 0


def test_run_of_a_gguf_file_is_checked_against_the_dequantised_file(tmp_path: Path, say: Said) -> None:
    """The reference is dequantised in transformers, since llama.cpp gives no likelihoods of texts."""
    run, _ = run_folder(
        tmp_path / "run", subwords(), layout="uniform", plan=plan_of(tiny("llama", **WIDE), groups=2, channels=64)
    )
    write_gguf(ExportSource.open(run), tmp_path / "base.gguf", "f32")
    (run / "config.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / "base.gguf"), "layout": "uniform"}))
    write_lines(tmp_path / "texts.jsonl", {"text": "the patient has a fever"}, {"text": "answer yes no maybe"})
    suite = suite_file(tmp_path, {"t": {"data": "texts.jsonl", "scorer": "nll", "limits": {"drop": 0.001}}})
    code, out, err = say("check", run, "--suite", suite, "--device", "cpu")
    assert (code, "ERROR" in out) == (0, False), err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "{model}", "--suite", "{tmp}/none.yaml"), "cannot read the suite"),
        (("eval", "{tmp}/none", "--suite", "{suite}"), "not a model folder"),
        (("eval", "{tmp}/none.gguf", "--suite", "{suite}"), "no such file"),
        (("eval", "{model}", "--suite", "{suite}", "--out", "{tmp}/no/where.json"), "in a folder that exists"),
        (("check", "{model}", "--suite", "{suite}"), "name the reference with --against"),
        (("check", "{tmp}/none.json", "--suite", "{suite}", "--against", "{model}"), "cannot be read"),
        (
            ("check", "{suite}.json", "--suite", "{suite}", "--against", "{model}"),
            "suite.yaml.json: cannot be read (evaluation has format 3",
        ),
        (("eval", "http:///v1", "--suite", "{suite}"), "is no URL"),
        (("eval", "{model}", "--suite", "{suite}", "--device", "warp"), "device 'warp' is not available"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, say: Said, arguments: tuple[str, ...], message: str) -> None:
    suite = suite_file(tmp_path, TASKS)
    Path(f"{suite}.json").write_text('{"format": 3}')
    names = {"model": model_folder(tmp_path / "model"), "tmp": tmp_path, "suite": suite}
    code, out, err = say(*(argument.format(**names) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ("{tmp}/typo", "not a model folder"),
        ("{tmp}/typo.gguf", "no such file"),
        ("{tmp}/typo.json", "cannot be read"),
        ("no-such-model", "model no-such-model: no configuration found"),
        ("{tmp}/bare", "no tokenizer found|its tokenizer has no vocabulary"),
        ("{tmp}/void", "the folder has no config.json"),
        ("http:///v1", "is no URL"),
    ],
)
def test_reference_that_cannot_be_opened_is_refused_before_the_model_is_scored(
    tmp_path: Path, say: Said, monkeypatch: pytest.MonkeyPatch, against: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "prunetune.evaluation.suites.evaluate_and_check.evaluate_suite", lambda *_, **__: pytest.fail("it was scored")
    )
    model, suite = model_folder(tmp_path / "model"), suite_file(tmp_path, TASKS)
    tiny("llama").save_pretrained(tmp_path / "bare")
    (tmp_path / "void").mkdir()
    code, out, err = say("check", model, "--suite", suite, "--against", against.format(tmp=tmp_path), "--device", "cpu")
    assert (code, out) == (2, "")
    assert re.search(message, err.splitlines()[-1])


def test_other_tasks_are_reported_if_one_fails(tmp_path: Path, say: Said) -> None:
    suite = suite_file(tmp_path, {**TASKS, "bad": {"data": "nowhere.jsonl", "scorer": "accuracy"}})
    code, out, err = say("eval", model_folder(tmp_path / "model"), "--suite", suite, "--device", "cpu")
    assert code == 2
    assert "accuracy" in out
    assert "no such file" in out
    assert err.strip().endswith("1 of 2 tasks could not be scored: bad")


def test_root_overrides_where_a_suite_finds_its_data(tmp_path: Path, say: Said) -> None:
    (tmp_path / "data").mkdir()
    suite_file(tmp_path / "data", TASKS)
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"tasks": TASKS}))
    model = model_folder(tmp_path / "model")
    assert say("eval", model, "--suite", suite, "--device", "cpu")[0] == 2
    assert say("eval", model, "--suite", suite, "--device", "cpu", "--root", tmp_path / "data")[0] == 0


def test_render_evaluation_shows_scores_and_errors() -> None:
    text = render_evaluation(Evaluation({"t": answers("10"), "bad": TaskResult("bad", {}, (), error="why")}))
    assert "bad: not scored: why" in text


def test_statistical_limit_against_a_reference_that_is_no_number_is_broken() -> None:
    result = check_task(graded([0.5, 0.6, 0.7]), graded([0.5, math.nan, 0.7]), {"statistical": True})
    assert result.exit_code == 1
    (verdict,) = result.broken
    assert math.isnan(verdict.p)


def test_reference_of_zero_cannot_be_fallen_below() -> None:
    assert not check_task(answers("0000"), answers("0000"), {"relative": 0.9}).broken
    assert not check_task(answers("0100"), answers("0000"), {"relative": 0.9}).broken


def test_correction_of_p_values_leaves_other_limits_as_they_are() -> None:
    fell = check_task(answers("1" * 10 + "0" * 30), answers("1" * 40), {"min": 0.9, "statistical": True})
    assert [verdict.broken for verdict in fell.verdicts] == [True, True]
    held = check_task(answers("1" * 10 + "0" * 30), answers("1" * 40), {"min": 0.2, "statistical": True})
    assert [verdict.broken for verdict in held.verdicts] == [False, True]
