"""Encoding: prompt, answer and end tokens for every tokenizer and template; length limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prunetune.config.recipe import DataConfig
from prunetune.data.encoding import chat_end_ids, chat_stop_id, encode, encode_answer, encode_prompts
from prunetune.data.records import Message, Record, record_from_row
from prunetune.errors import DataError
from support.data import CHAT, subwords

PAIR = Record(kind="completion", prompt="the patient has", completion=" fever", id="a", source="f:1", weight=2.0)
TALK = Record(
    kind="chat",
    messages=(Message("user", "has the patient a fever"), Message("assistant", "yes"), Message("user", "a cough")),
    completion="no",
    source="f:2",
)
TEXT = Record(kind="text", completion="the patient has a fever and a cough", source="f:3")
ALL = [PAIR, TALK, TEXT]


def encode_one(record: Record, tokenizer: Any, **options: Any) -> Any:
    return encode([record], tokenizer, DataConfig(**options), 1000).examples[0]


@pytest.mark.parametrize("adds", ["<s> $A", "$A", "<s> $A </s>", "$A </s>"])
def test_example_is_prompt_answer_and_end_for_every_tokenizer(adds: str) -> None:
    tokenizer = subwords(adds=adds)
    start = [tokenizer.bos_token_id] if adds.startswith("<s>") else []
    example = encode_one(PAIR, tokenizer)
    prompt = start + encode_answer(PAIR.prompt, tokenizer)
    assert example.token_ids == (*prompt, *encode_answer(" fever", tokenizer), tokenizer.eos_token_id)
    assert example.answer_start == len(prompt)
    assert (example.id, example.weight) == (PAIR.source, 2.0)
    text = encode_one(TEXT, tokenizer)
    assert text.token_ids == (*start, *encode_answer(TEXT.completion, tokenizer), tokenizer.eos_token_id)
    assert text.answer_start == 1


@pytest.mark.parametrize("template", ["auto", "chat", "raw"])
def test_example_begins_with_the_prompt_that_generation_starts_from(template: Any) -> None:
    tokenizer = subwords()
    for record in ALL:
        example = encode_one(record, tokenizer, template=template, loss="last")
        prompt = encode_prompts([record], tokenizer, template)[0]
        assert list(example.token_ids[: example.answer_start]) == prompt
        answer = encode_answer(record.completion, tokenizer)
        assert list(example.token_ids[example.answer_start :])[: len(answer)] == answer
        assert 0 < example.answer_start < len(example.token_ids)


def test_encoding_many_equals_encoding_one_by_one() -> None:
    tokenizer = subwords()
    together = encode(ALL * 2, tokenizer, DataConfig(), 1000)
    assert list(together.examples) == [encode_one(record, tokenizer) for record in ALL * 2]
    assert together.kept_indices == tuple(range(6))
    assert together.num_too_long == 0
    assert together.longest == max(len(example.token_ids) for example in together.examples)


def test_chat_follows_the_template_up_to_the_end_of_the_turn() -> None:
    tokenizer = subwords()
    expected = (
        "<s><|user|>has the patient a fever<|end|>\n<|assistant|>yes<|end|>\n"
        "<|user|>a cough<|end|>\n<|assistant|>no<|end|>"
    )
    assert tokenizer.decode(encode_one(TALK, tokenizer).token_ids) == expected
    assert tokenizer.decode(encode_one(PAIR, tokenizer, template="chat").token_ids) == (
        "<s><|user|>the patient has<|end|>\n<|assistant|> fever<|end|>"
    )


@pytest.mark.parametrize(
    ("chat", "end", "closing"),
    [
        (CHAT, "<|end|>", "<|end|>"),
        (CHAT.replace("<|end|>\n", "<|end|><s>more"), "<|end|>", "<|end|>"),
        (CHAT.replace("<|end|>\n", "\n"), "</s>", "</s>"),
        (CHAT.replace("{{ m['content'] }}", "{{ m['content'] | trim }}"), "</s>", "<|end|>"),
    ],
)
def test_encoded_turn_ends_at_the_token_that_stops_generation(chat: str, end: str, closing: str) -> None:
    tokenizer = subwords(chat=chat, end=end)
    example = encode_one(TALK, tokenizer, loss="last")
    assert tokenizer.decode(example.token_ids[example.answer_start :]) == "no" + closing


@pytest.mark.parametrize(
    ("closing", "end", "stop"),
    [
        ("<|end|>\n", "</s>", "<|end|>"),
        ("<|end|>", "<|end|>", "<|end|>"),
        ("\n<|end|></s>", "</s>", "<|end|>"),
        (" </s>", "</s>", "</s>"),
        ("\n--", "</s>", ""),
    ],
)
def test_generation_stops_at_the_special_token_that_ends_a_turn(closing: str, end: str, stop: str) -> None:
    tokenizer = subwords(chat="{% for m in messages %}{{ m['content'] }}" + closing + "{% endfor %}", end=end)
    stop_id = chat_stop_id(tokenizer)
    assert stop_id == (tokenizer.convert_tokens_to_ids(stop) if stop else None)
    assert stop_id in chat_end_ids(tokenizer) or not stop
    tokenizer.eos_token = None
    assert chat_stop_id(tokenizer) == stop_id


def test_raw_chat_names_the_speakers() -> None:
    tokenizer = subwords(chat=None)
    decoded = tokenizer.decode(encode_one(TALK, tokenizer, template="raw").token_ids)
    assert decoded == "<s>user: has the patient a fever\nassistant: yes\nuser: a cough\nassistant:no</s>"


def test_missing_or_failing_chat_template_error_names_the_row() -> None:
    with pytest.raises(DataError, match=r"^f:2: .*none.*data\.template=raw"):
        encode_one(TALK, subwords(chat=None))
    with pytest.raises(DataError, match=r"^f:2: .*refuses these messages \(only one turn\)"):
        encode_one(TALK, subwords(chat="{% if messages|length > 2 %}{{ raise_exception('only one turn') }}{% endif %}"))


def test_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = subwords()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        encode_one(PAIR, tokenizer)


def rows(count: int) -> list[Record]:
    return [
        Record(kind="completion", prompt="fever " * (n + 1), completion="yes", source=f"f:{n + 1}", id=str(n))
        for n in range(count)
    ]


def lengths(records: list[Record]) -> list[int]:
    return [len(example.token_ids) for example in encode(records, subwords(), DataConfig(), 10_000).examples]


@pytest.mark.parametrize(
    ("option", "context", "advice"),
    [
        (0, 0, "take a model with more context"),
        (0, 1000, "raise data.max_length (the model's context is 1000)"),
    ],
)
def test_too_long_rows_are_counted_in_the_error(option: int, context: int, advice: str) -> None:
    records = rows(10)
    size = lengths(records)
    limit = size[6]
    with pytest.raises(DataError) as refused:
        encode(records, subwords(), DataConfig(max_length=limit if context else option), context or limit)
    message = str(refused.value)
    assert message.startswith(f"3 of 10 rows have more than {limit} tokens (longest {size[-1]}), first f:8;")
    assert advice in message
    for remedy in ("data.too_long=truncate", "data.too_long=drop", "data.max_length"):
        assert remedy in message


def test_drop_keeps_the_rows_that_fit() -> None:
    records = rows(10)
    limit = lengths(records)[6]
    encoded = encode(records, subwords(), DataConfig(too_long="drop"), limit)
    assert [example.id for example in encoded.examples] == [f"f:{n + 1}" for n in range(7)]
    assert encoded.kept_indices == tuple(range(7))
    assert encoded.num_too_long == 3
    assert encode(records, subwords(), DataConfig(too_long="drop"), 2).examples == ()


@pytest.mark.parametrize("limit", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("adds", ["<s> $A", "$A"])
def test_truncating_cuts_the_beginning_of_the_prompt_first(limit: int, adds: str) -> None:
    tokenizer = subwords(adds=adds)
    records = [*rows(10), PAIR, TEXT]
    whole = encode(records, tokenizer, DataConfig(), 10_000).examples
    encoded = encode(records, tokenizer, DataConfig(too_long="truncate"), limit)
    assert encoded.num_too_long == sum(len(example.token_ids) > limit for example in whole)
    for before, after in zip(whole, encoded.examples, strict=True):
        assert len(after.token_ids) == min(limit, len(before.token_ids))
        assert 0 < after.answer_start < len(after.token_ids)
        answer = before.token_ids[before.answer_start :]
        assert after.token_ids[after.answer_start :] == answer[: limit - 1]
        prompt = after.token_ids[: after.answer_start]
        if adds == "<s> $A" and len(prompt) > 1:
            assert prompt[0] == tokenizer.bos_token_id
            prompt = prompt[1:]
        if before.answer_start > 1:
            assert before.token_ids[before.answer_start - len(prompt) : before.answer_start] == prompt


def test_limit_below_two_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="needs 2 tokens"):
        encode([PAIR], subwords(), DataConfig(max_length=1), 100)


def test_chat_template_without_an_end_is_refused_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunetune.data.chat_template.RENDER_SECONDS", 0.3)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"^f:2: .*does not come to an end \(it takes longer than 0\.3 s\)"):
        encode_prompts([TALK], subwords(chat=endless))


def loss_of(example: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example.token_ids[start:end]) for start, end in example.loss_spans]


@pytest.mark.parametrize("adds", ["<s> $A", "$A", "<s> $A </s>"])
def test_raw_chat_tunes_on_every_answer(adds: str) -> None:
    tokenizer = subwords(adds=adds)
    assert loss_of(encode_one(TALK, tokenizer, template="raw"), tokenizer) == [" yes\n", "no</s>"]
    assert loss_of(encode_one(TALK, tokenizer, template="raw", loss="last"), tokenizer) == ["no</s>"]
    muted = replace(TALK, messages=(TALK.messages[0], replace(TALK.messages[1], has_loss=False), TALK.messages[2]))
    assert loss_of(encode_one(muted, tokenizer, template="raw"), tokenizer) == ["no</s>"]
    whole = encode_one(muted, tokenizer, template="raw", loss="all")
    assert " yes" not in "".join(loss_of(whole, tokenizer))
    assert whole.token_ids == encode_one(TALK, tokenizer, template="raw").token_ids


def test_raw_chat_writes_tools_and_calls_as_json() -> None:
    call = {"function": {"name": "look_up", "arguments": {"n": 2}}}
    row = {
        "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"a": 1}],
    }
    record = record_from_row(row, source="f:1")
    decoded = subwords().decode(encode_one(record, subwords(), template="raw").token_ids)
    assert decoded == '<s>tools: [{"a": 1}]\nuser: one\nassistant:{"name": "look_up", "arguments": {"n": 2}}</s>'


@pytest.mark.parametrize("adds", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("tail", ["</s>", "</s>\n"])
def test_text_with_its_own_start_and_end_gets_no_second(adds: str, tail: str) -> None:
    tokenizer = subwords(adds=adds)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain = encode_one(TEXT, tokenizer)
    own = encode_one(replace(TEXT, completion=f"<s>{TEXT.completion}{tail}"), tokenizer)
    assert own.token_ids[: len(plain.token_ids)] == plain.token_ids
    assert (own.token_ids.count(start), own.token_ids.count(end), own.answer_start) == (1, 1, 1)
    pair = encode_one(replace(PAIR, prompt=f"<s>{PAIR.prompt}", completion=f"{PAIR.completion}{tail}"), tokenizer)
    expected = encode_one(PAIR, tokenizer)
    assert pair.token_ids[: len(expected.token_ids)] == expected.token_ids
    assert (pair.token_ids.count(start), pair.token_ids.count(end)) == (1, 1)
    assert pair.answer_start == expected.answer_start
    chat = encode_one(replace(PAIR, completion=" fever<|end|>"), tokenizer, template="chat")
    assert chat.token_ids == encode_one(PAIR, tokenizer, template="chat").token_ids


@pytest.mark.parametrize("end", ["</s>", "</s>\n"])
def test_answers_of_a_chat_with_their_own_end_get_no_second(end: str) -> None:
    tokenizer = subwords(chat=CHAT.replace("<|end|>", "</s>"))
    messages = (TALK.messages[0], replace(TALK.messages[1], content="yes"), TALK.messages[2])
    plain = encode_one(replace(TALK, messages=messages), tokenizer)
    ended = (messages[0], replace(messages[1], content=f"yes{end}"), messages[2])
    own = replace(TALK, messages=ended, completion=f"{TALK.completion}{end}")
    assert encode_one(own, tokenizer) == plain
    assert plain.token_ids.count(tokenizer.eos_token_id) >= 2


@pytest.mark.parametrize("adds", ["<s> $A", "$A"])
def test_each_start_token_of_a_text_of_several_turns_is_its_own(adds: str) -> None:
    """Mistral's form."""
    tokenizer = subwords(adds=adds)
    for row in (replace(TEXT, completion="<s>one</s><s>two</s>"), replace(PAIR, prompt="<s>one</s><s>two")):
        assert encode_one(row, tokenizer).token_ids.count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize("limit", [2, 3, 6, 9, 14, 20, 30])
@pytest.mark.parametrize("loss", ["assistants", "last", "all"])
def test_truncated_chat_keeps_the_loss_of_what_is_left(limit: int, loss: Any) -> None:
    tokenizer = subwords()
    whole = encode_one(TALK, tokenizer, loss=loss)
    (short,) = encode([TALK], tokenizer, DataConfig(too_long="truncate", loss=loss), limit).examples
    assert len(short.token_ids) == min(limit, len(whole.token_ids))
    assert 0 < short.answer_start < len(short.token_ids)
    assert 0 < short.loss_tokens == sum(end - start for start, end in short.loss_spans)
    assert short.loss_spans[-1][1] == len(short.token_ids)
    if loss == "all":
        assert short.token_ids == whole.token_ids[:limit]
        return
    last = whole.loss_spans[-1][0]
    cut = last - short.loss_spans[-1][0]
    counted = {at for start, end in whole.loss_spans for at in range(start, end)}
    for start, end in short.loss_spans:
        assert {at + cut for at in range(start, end)} <= counted
        assert short.token_ids[start:end] == whole.token_ids[start + cut : end + cut]
    assert short.loss_tokens == len({at for at in counted if cut < at < cut + limit and at - cut >= 1})


def test_loss_all_counts_prompts_too() -> None:
    example = encode_one(PAIR, subwords(), loss="all")
    assert example.token_ids == encode_one(PAIR, subwords()).token_ids
    assert (example.answer_start, example.no_loss) == (1, ())
