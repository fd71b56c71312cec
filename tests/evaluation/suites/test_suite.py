"""The suite file: accepted keys, errors of faulty tasks, and records made from rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prunetune.data.records import Message
from prunetune.errors import ConfigError, DataError
from prunetune.evaluation.suites import load_suite, parse_suite
from prunetune.evaluation.suites.prompts import build_prompts
from prunetune.evaluation.suites.suite import Suite, SuiteLimit, Task
from support.data import write_lines
from support.suites import ALL, suite_in

FINE: dict[str, Any] = {"data": "chosen.jsonl", "scorer": "accuracy"}


def only(task: dict[str, Any], **keys: Any) -> Task:
    (loaded,) = parse_suite({"tasks": {"t": task}, **keys}).tasks
    return loaded


def test_tasks_are_a_mapping_or_a_list(tmp_path: Path) -> None:
    mapped = suite_in(tmp_path, ALL)
    listed = suite_in(tmp_path, [{"name": name, **task} for name, task in ALL.items()])
    assert mapped == listed
    assert [task.metrics[0] for task in mapped.tasks] == ["accuracy", "rouge_l", "perplexity"]


def test_defaults_apply_to_every_task_that_does_not_override_them(tmp_path: Path) -> None:
    suite = suite_in(tmp_path, {"a": FINE, "b": {**FINE, "limit": 2}}, defaults={"limit": 5, "scorer": "macro_f1"})
    assert [len(build_prompts(task)) for task in suite.tasks] == [5, 2]
    assert [task.metrics for task in suite.tasks] == [("accuracy",), ("accuracy",)]


def test_limit_is_one_bound_on_one_metric() -> None:
    task = only({**FINE, "limits": {"min": 0.5, "relative": 0.9, "statistical": True}}, level=0.01)
    assert [(limit.metric, limit.kind, limit.bound) for limit in task.limits] == [
        ("accuracy", "min", 0.5),
        ("accuracy", "relative", 0.9),
        ("accuracy", "statistical", 0.01),
    ]
    task = only({"data": "x", "scorer": "rouge", "limits": {"rouge_1": {"drop": 0.1}, "rouge_l": {"statistical": 0.2}}})
    assert task.limits == (SuiteLimit("t", "rouge_1", "drop", 0.1), SuiteLimit("t", "rouge_l", "statistical", 0.2))
    assert only({**FINE, "limits": {"statistical": False}}).limits == ()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({**FINE, "scorer": "acuracy"}, "scorer 'acuracy' is not known; did you mean accuracy"),
        ({**FINE, "scorer": "zzz"}, "known are accuracy, macro_f1"),
        ({**FINE, "limt": 3}, "unknown key limt; did you mean limit"),
        ({**FINE, "limit": -1}, r"limit must lie in \[0, inf\)"),
        ({**FINE, "limit": "many"}, "limit must be a whole number"),
        ({**FINE, "likelihood": "average"}, "likelihood must be one of mean, sum, characters"),
        ({**FINE, "limits": {"minimum": 1}}, "unknown key minimum; did you mean min"),
        ({**FINE, "limits": {"accurac": {"min": 1}}}, "metric 'accurac' is not known; did you mean accuracy"),
        ({**FINE, "limits": {"statistical": 2}}, r"statistical must lie in \(0, 0.5\]|must lie in"),
        ({**FINE, "limits": 0.5}, "limits maps min"),
        ({**FINE, "limits": {"accuracy": 0.5}}, "unknown key accuracy"),
        ({"scorer": "accuracy"}, "names no data"),
        ({"data": "x"}, "names no scorer"),
        ({"data": "x", "scorer": []}, "scorer names nothing"),
        ({"data": "x", "scorer": 3}, "scorer is a name"),
        ({"data": "x", "scorer": {"regex": {}}}, "scorer regex needs pattern"),
        ({"data": "x", "scorer": {"regex": {"patern": "a"}}}, "option 'patern' is not known; did you mean pattern"),
        ({"data": "x", "scorer": {"regex": {"pattern": 3}}}, "pattern must be text, got 3"),
        ({"data": "x", "scorer": {"accuracy": {"mean": True}}}, "scorer accuracy has no options"),
        ({"data": "x", "scorer": ["rouge", "rouge"]}, "two scorers give rouge_l"),
        ({"data": "x", "scorer": "rouge", "stop": ["\n", ""]}, "stop has an empty text"),
        ("accuracy", "maps options to values"),
        ({"lm_eval": "arc_easy", "limits": {"min": 0.5}}, "name their metric"),
    ],
)
def test_faulty_task_keeps_its_error_and_the_others_load(task: Any, message: str) -> None:
    suite = parse_suite({"tasks": {"wrong": task, "fine": FINE}})
    assert [bool(loaded.error) for loaded in suite.tasks] == [True, False]
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(suite.tasks[0].error)
    assert "\n" not in suite.tasks[0].error
    assert "task wrong" in suite.tasks[0].error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "has the key tasks"),
        ([], "has the key tasks"),
        ({"tasks": {}}, "has the key tasks"),
        ({"tasks": "accuracy"}, "tasks is a list or a mapping"),
        ({"tasks": {"t": FINE}, "defaults": 3}, "defaults map options of every task to values, got 3"),
        ({"taks": {}, "tasks": {"t": FINE}}, "key 'taks' is not known; did you mean tasks"),
        ({"tasks": {"t": FINE}, "level": 5}, r"level must lie in \(0, 0.5\]"),
        ({"tasks": {"t": FINE}, "correction": "bonferoni"}, "correction 'bonferoni' is not known"),
        ({"tasks": [{**FINE, "name": "a"}, {**FINE, "name": "a"}]}, "two tasks are called a"),
    ],
)
def test_file_that_is_no_suite_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_suite(values)


def test_unreadable_suite_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("tasks: [")
    (tmp_path / "latin.yaml").write_bytes(b"tasks: \xe9")
    (tmp_path / "twice.yaml").write_text("tasks:\n  t: {data: x}\n  t: {data: y}\n")  # one would be lost
    for name in ("missing.yaml", "broken.yaml", "latin.yaml", "twice.yaml"):
        with pytest.raises(ConfigError) as refused:
            load_suite(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="did you mean accuracy"):
        suite_in(tmp_path, {"t": {**FINE, "scorer": "acuracy"}})
    assert suite_in(tmp_path, {"t": {**FINE, "scorer": "acuracy"}}, strict=False).tasks[0].error


def rows(tmp_path: Path, task: dict[str, Any], *lines: Any) -> Any:
    write_lines(tmp_path / "rows.jsonl", *lines)
    values = {"tasks": {"t": {"data": "rows.jsonl", **task}}}
    return build_prompts(parse_suite(values, folder=tmp_path).tasks[0])


NESTED = {"question": "Which?", "options": {"text": ["a thing", "another"], "label": ["A", "B"]}, "key": "B"}


def test_templates_make_records_of_any_row(tmp_path: Path) -> None:
    task = {
        "scorer": "accuracy",
        "prompt": "Question: {{ question }}\nAnswer:",
        "choices": "options.text",
        "answer": "options.label.index(key)",
    }
    (posed,) = rows(tmp_path, task, NESTED)
    assert (posed.record.prompt, posed.expected) == ("Question: Which?\nAnswer:", "another")
    (written,) = rows(tmp_path, {"scorer": "rouge", "prompt": "{{ question }}", "completion": "{{ key }}"}, NESTED)
    assert (written.record.completion, written.record.choices) == ("B", ())
    (text,) = rows(tmp_path, {"scorer": "perplexity", "text": "{{ question }} {{ key }}"}, NESTED)
    assert (text.record.kind, text.record.completion) == ("text", "Which? B")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"prompt": "{{ qestion }}"}, "'qestion' is undefined; the row has key, options, question"),
        ({"prompt": "{{ question"}, "not a Jinja2 template"),
        ({"choices": "options.text +"}, "not a Jinja2 expression"),
        ({"prompt": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
        ({"prompt": "{{ question.nothing }}"}, "no attribute 'nothing'"),
        ({"prompt": "q", "choices": "1 / 0", "answer": "key"}, "division by zero"),
        ({"prompt": "q", "choices": "options.text", "answer": "9"}, "outside choices"),
        ({"prompt": "q"}, "no completion"),
    ],
)
def test_template_error_names_the_row(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        rows(tmp_path, {"scorer": "accuracy", **task}, NESTED)


def test_bad_rows_of_a_task_are_counted(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "completion": "" if n in (1, 2, 4, 5) else "c"} for n in range(8)]
    with pytest.raises(DataError, match=r"completion is empty.*\(4 of 8 rows cannot be used, also ") as refused:
        rows(tmp_path, {"scorer": "rouge"}, *lines)
    assert str(refused.value).count("rows.jsonl:") == 3


def test_scorer_that_does_not_fit_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="compares choices, and the row has none"):
        rows(tmp_path, {"scorer": "accuracy"}, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match="generates answers, and the row is a text"):
        rows(tmp_path, {"scorer": "rouge"}, {"text": "b"})
    with pytest.raises(DataError, match="row is 3"):
        rows(tmp_path, {"scorer": "rouge"}, 3)


def test_rows_without_answer_are_accepted_if_no_scorer_needs_it(tmp_path: Path) -> None:
    (posed,) = rows(tmp_path, {"scorer": {"regex": {"pattern": "^yes"}}}, {"prompt": "a"})
    assert posed.expected == ""
    with pytest.raises(DataError, match="no completion"):
        rows(tmp_path, {"scorer": {"regex": {"pattern": "(yes)"}}}, {"prompt": "a"})
    with pytest.raises(DataError, match="no completion"):
        rows(tmp_path, {"scorer": "contains"}, {"prompt": "a"})


def test_lettered_questions_list_their_choices(tmp_path: Path) -> None:
    row = {"prompt": "### Input:\nWhich?\n\n### Response:\n", "choices": ["one", "two"], "answer": 1}
    task = {"scorer": "accuracy", "lettered": True, "before": "### Response:\n", "heading": "### Options:\n"}
    (posed,) = rows(tmp_path, task, row)
    assert posed.record.prompt == "### Input:\nWhich?\n\n### Options:\nA. one\nB. two\n\n### Response:\n"
    assert (posed.record.choices, posed.record.completion, posed.expected) == (("A", "B"), "B", "two")
    (plain,) = rows(tmp_path, {"scorer": "accuracy", "lettered": True}, {**row, "prompt": "Which?"})
    assert plain.record.prompt == "Which?\nA. one\nB. two\nAnswer:"
    assert plain.record.choices == (" A", " B")
    with pytest.raises(DataError, match="does not end with"):
        rows(tmp_path, task, {**row, "prompt": "Which?"})
    chat = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "two"}]}
    (turn,) = rows(tmp_path, {"scorer": "accuracy", "lettered": True}, {**chat, "choices": ["one", "two"]})
    assert turn.record.messages == (Message("user", "Which?\nA. one\nB. two\n"),)
    many = [str(n) for n in range(27)]
    with pytest.raises(DataError, match="2 to 26 choices"):
        rows(tmp_path, {"scorer": "accuracy", "lettered": True}, {**row, "prompt": "a", "choices": many})


def test_sample_is_stable_when_rows_are_added(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{n}", "completion": "c", "id": n} for n in range(30)]
    few = {posed.record.id for posed in rows(tmp_path, {"scorer": "rouge", "limit": 5}, *lines[:20])}
    more = {posed.record.id for posed in rows(tmp_path, {"scorer": "rouge", "limit": 15}, *lines[:20][::-1])}
    assert len(few) == 5
    assert few < more


def test_bundled_suites_load() -> None:
    folder = Path(__file__).parents[3] / "suites"
    loaded = sorted(folder.glob("*.yaml"))
    assert {path.stem for path in loaded} >= {"demo", "healthcare", "legal"}
    assert all(isinstance(load_suite(path), Suite) for path in loaded)
