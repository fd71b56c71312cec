"""Records from rows: every form, derived fields, identity of questions, and malformed rows refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from prunetune.data.records import Message, record_from_row
from prunetune.errors import DataError


def record_of(**fields: Any) -> Any:
    return record_from_row(fields, source="f.jsonl:7", id="f.jsonl:7", task="t")


def test_each_form_becomes_a_record() -> None:
    pair = record_of(prompt="p", completion="c", id=3, task="own")
    assert (pair.kind, pair.prompt, pair.completion, pair.id, pair.task) == ("completion", "p", "c", "3", "own")
    text = record_of(text="all of it")
    assert (text.kind, text.completion, text.id, text.task) == ("text", "all of it", "f.jsonl:7", "t")
    chat = record_of(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    assert (chat.kind, chat.messages, chat.completion) == ("chat", (Message("user", "hi"),), "yo")


@pytest.mark.parametrize(
    "fields", [{"answer": 1}, {"answer": "b"}, {"answer": "1"}, {"completion": "b"}, {"completion": "b", "answer": 1}]
)
def test_completion_choices_and_answer_follow_from_each_other(fields: dict[str, Any]) -> None:
    record = record_of(prompt="p", choices=["a", "b"], **fields)
    assert record.completion == record.choices[record.answer] == "b"


def test_digits_that_are_a_choice_are_its_text_not_an_index() -> None:
    assert record_of(prompt="p", choices=["1", "0"], answer="0").answer == 1


def test_nulls_are_absent_and_unused_fields_are_free() -> None:
    record = record_of(
        prompt="p", completion="c", choices=None, answer=None, messages=None, score=float("nan"), n=10**5000
    )
    assert record.kind == "completion"
    assert record.choices == ()


def test_question_hash_ignores_case_space_answer_and_order_of_choices() -> None:
    assert (
        record_of(prompt="A  b\n", completion="x").question_hash()
        == record_of(prompt=" a B", completion="y").question_hash()
    )
    record = record_of(prompt="p", choices=["a", "b"], answer=0)
    assert record.question_hash() == record_of(prompt="p", choices=["b", "a"], answer=0).question_hash()
    assert record.question_hash() != record_of(prompt="p", choices=["a", "c"], answer=0).question_hash()
    assert record_of(text="a").question_hash() != record_of(text="b").question_hash()


@pytest.mark.parametrize("answered", [{"completion": "a"}, {"choices": ["a", "b"], "answer": 0}])
def test_only_user_message_is_the_prompt(answered: dict[str, Any]) -> None:
    def chat(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in (*turns, ("assistant", "a"))]
        return str(record_of(messages=messages, **answered).question_hash())

    expected = record_of(prompt="Is it so?", **answered).question_hash()
    assert chat(("user", "is it  SO?")) == expected
    assert expected not in {chat(("system", "Is it so?")), chat(("system", "Be brief."), ("user", "Is it so?"))}
    assert chat(("user", "Hi"), ("assistant", "Yes?"), ("user", "Is it so?")) != expected


def test_question_hash_without_choices_is_that_of_the_question_alone() -> None:
    listed = record_of(prompt="p", choices=["a", "b"], answer=0)
    assert (
        listed.question_hash(with_choices=False)
        == record_of(prompt="P", completion="x").question_hash()
        != listed.question_hash()
    )


WRONG = [
    ({}, "no fields", "messages, or text"),
    ({"question": "q", "reply": "r"}, "question, reply", "prompt + completion"),
    ({"prompt": "p"}, "no completion", "prompt + choices + answer"),
    ({"completion": "c"}, "row has completion", "prompt + completion"),
    ({"prompt": 3, "completion": "c"}, "prompt must be text", "3"),
    ({"prompt": "p", "completion": True}, "completion must be text", "True"),
    ({"prompt": "p", "completion": float("nan")}, "completion must be text", "nan"),
    ({"prompt": 10**5000, "completion": "c"}, "prompt must be text", "huge"),
    ({"prompt": " ", "completion": "c"}, "prompt is empty", "remove the row"),
    ({"prompt": "p", "completion": ""}, "completion is empty", "remove the row"),
    ({"prompt": "\ud800", "completion": "c"}, "surrogate", "UTF-8"),
    ({"text": ["a"]}, "text must be text", "['a']"),
    ({"prompt": "p", "choices": "ab", "answer": 0}, "choices must be a list", "'ab'"),
    ({"prompt": "p", "choices": ["a"], "answer": 0}, "two texts or more", "['a']"),
    ({"prompt": "p", "choices": ["a", 2], "answer": 0}, "choices[1] must be text", "2"),
    ({"prompt": "p", "choices": ["a", "a"], "answer": 0}, "'a' twice", "differ"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": 2}, "answer 2 lies outside", "0..1"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": -1}, "answer -1 lies outside", "0..1"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": True}, "must be an index", "True"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": 0.5}, "must be an index", "0.5"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": float("nan")}, "must be an index", "nan"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": "C"}, "'C' lies outside", "A to B"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": "BB"}, "must be an index", "'BB'"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": 10**5000}, "lies outside", "huge"),
    ({"prompt": "p", "choices": ["a", "b"]}, "no completion", "add answer"),
    ({"prompt": "p", "choices": ["a", "b"], "completion": "c"}, "'c', which is none", "add answer"),
    ({"prompt": "p", "choices": ["a", "b"], "answer": 0, "completion": "b"}, "choices[0] is 'a'", "correct one"),
    ({"messages": "hi"}, "must be a list", "'hi'"),
    ({"messages": []}, "there is none", "assistant"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "must hold a question", "assistant"),
    ({"messages": [{"role": "user", "content": "a"}] * 2}, "from 'user'", "assistant"),
    ({"messages": [{"role": "user"}]}, "messages[0] must have role and content", "user"),
    ({"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}, "messages[0].content", "1"),
    ({"prompt": [10**5000], "completion": "c"}, "prompt must be text", "huge"),
    ({"text": "a", "task": ["x"]}, "task must be text", "['x']"),
    ({"text": "a", "id": 1.5}, "id must be text", "1.5"),
]


@pytest.mark.parametrize(("fields", "problem", "advice"), WRONG)
def test_malformed_row_is_refused_in_one_line_that_names_it(fields: dict[str, Any], problem: str, advice: str) -> None:
    with pytest.raises(DataError) as refused:
        record_of(**fields)
    message = str(refused.value)
    assert message.startswith("f.jsonl:7: ")
    assert "\n" not in message
    assert problem in message
    assert advice in message
    assert len(message) < 300


@pytest.mark.parametrize("row", [3, "text", ["prompt"], None, float("inf")])
def test_row_that_is_no_object_is_refused(row: Any) -> None:
    with pytest.raises(DataError, match=r"^f:1: row is .*object"):
        record_from_row(row, source="f:1")


def test_row_without_the_group_field_is_refused() -> None:
    assert record_from_row({"text": "a", "doc": 7}, source="f:1", group_field="doc").group == "7"
    with pytest.raises(DataError, match=r"^f:1: row has no doc, which data.group names"):
        record_from_row({"text": "a"}, source="f:1", group_field="doc")


def test_error_messages_are_one_line_for_any_row() -> None:
    with pytest.raises(DataError) as refused:
        record_of(prompt=["line\nline"] * 1000, completion="c")
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError) as refused:
        record_of(**{"a\nb" * 3: 1})
    assert "\n" not in str(refused.value)
