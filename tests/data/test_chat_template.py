"""Loss of chats: token for token as TRL counts it, with templates that mark generations and with those that do not."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prunetune.config.recipe import DataConfig
from prunetune.data.encoding import encode, encode_prompts
from prunetune.data.records import record_from_row
from prunetune.errors import DataError
from prunetune.model.loading import demo_file
from support.data import CHAT, subwords

Row = dict[str, Any]
WORDS = [
    "Which", " sign", " is it?", "heart", " lung", "\n\n", "- one\n- two", "  fever", " naïve µg", "🫀", ' {"x": 1}',
    " <b>", " Yes.", " No!", "\n", " ", " 12 mg/day",
]  # fmt: skip
# As in Qwen and Llama 3: line ends are words of their own.
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Start token, end token, other special tokens, whether blanks are written ▁ as in sentencepiece.
FAMILIES: dict[str, tuple[str, str, tuple[str, ...], bool]] = {
    "qwen": ("<|endoftext|>", "<|im_end|>", ("<|im_start|>",), False),
    "llama": ("<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"), False),
    "gemma": ("<bos>", "<end_of_turn>", ("<start_of_turn>", "<eos>"), True),
    "gptoss": ("<s>", "<|return|>", ("<|start|>", "<|end|>", "<|call|>", "<|channel|>", "<|user|>"), False),
    "deepseek": ("<s>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), False),
    "phi": ("<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), False),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} for a part",
            "parameters": {"type": "object", "properties": {"part": {"type": "string"}, "n": {"type": "integer"}}},
        },
    }
    for name in ("look_up", "weigh")
]


@cache
def _trained(family: str) -> str:
    start, end, others, has_metaspace = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if has_metaspace:
        lines = pre_tokenizers.Split(Regex(r"\n+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="never")])
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        alphabet = sorted({*"".join(WORDS), *map(chr, range(32, 127))})
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", start, end, *others],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*WORDS * 3, *map(json.dumps, TOOLS), "user\nassistant\nmodel\n\n"], trainer)
    return tokenizer.to_str()


def tokenizer_with(template: str, family: str) -> Any:
    start, end, _, _ = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)), bos_token=start, eos_token=end, pad_token=end
    )
    tokenizer.chat_template = template
    return tokenizer


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def made_up_chats(count: int, *, tools: bool, reasoning: bool) -> list[Row]:
    draw = random.Random(7)

    def text() -> str:
        words = "".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        return words if words.strip() else "heart"

    rows: list[Row] = []
    for index in range(count):
        messages: list[Row] = [{"role": "system", "content": text()}] if index % 2 else []
        has_tools = tools and index % 4 >= 2
        for _ in range(draw.randint(1, 4)):
            messages.append({"role": "user", "content": text()})
            if has_tools and draw.random() < 0.6:
                calls = [
                    {"type": "function", "function": {"name": "look_up", "arguments": {"part": text(), "n": 2}}}
                    for _ in range(draw.randint(1, 2))
                ]
                said = {"content": text()} if draw.random() < 0.5 else {"content": draw.choice(["", None])}
                messages.append({"role": "assistant", **said, "tool_calls": calls})
                messages += [{"role": "tool", "content": text()} for _ in calls]
            thought = {"reasoning_content": text()} if reasoning and draw.random() < 0.4 else {}
            inline = f"<think>\n{text()}\n</think>\n\n" if reasoning and draw.random() < 0.2 else ""
            messages.append({"role": "assistant", "content": inline + text(), **thought})
        rows.append({"messages": messages, **({"tools": TOOLS} if has_tools else {})})
    return rows


def encoded(rows: list[Row], tokenizer: Any, **options: Any) -> list[Any]:
    records = [record_from_row(row, source=f"f:{number}", id=str(number)) for number, row in enumerate(rows, 1)]
    return list(encode(records, tokenizer, DataConfig(**options), 100_000).examples)


def mask_of(example: Any) -> list[int]:
    return [int(any(start <= at < end for start, end in example.loss_spans)) for at in range(len(example.token_ids))]


def by_trl(row: Row, tokenizer: Any, template: str) -> tuple[list[int], list[int]]:
    """Tokens and loss mask as TRL's SFTTrainer makes them with `assistant_only_loss`."""
    made = tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), chat_template=template,
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    return made["input_ids"], made["assistant_masks"]


@pytest.mark.parametrize(
    ("name", "family", "tools", "reasoning"),
    [
        ("qwen3_training", "qwen", True, True),
        ("llama3_training", "llama", False, False),
        ("gemma3_training", "gemma", False, False),
    ],
)
def test_loss_equals_trls_token_by_token_where_generations_are_marked(
    name: str, family: str, tools: bool, reasoning: bool
) -> None:
    rows = made_up_chats(200, tools=tools, reasoning=reasoning)
    template = trl_template(name)
    tokenizer = tokenizer_with(template, family)
    for row, example in zip(rows, encoded(rows, tokenizer), strict=True):
        assert (list(example.token_ids), mask_of(example)) == by_trl(row, tokenizer, template)
    counts = [sum(message["role"] == "assistant" for message in row["messages"]) for row in rows]
    assert sum(counts) > 400
    assert any("tools" in row for row in rows) == tools


@pytest.mark.parametrize(
    ("name", "family"), [("llama3", "llama"), ("gemma3", "gemma"), ("phi3", "phi"), ("qwen3_instruct_2507", "qwen")]
)
def test_loss_without_marks_equals_trls_up_to_white_space_after_a_turn(name: str, family: str) -> None:
    rows = made_up_chats(60, tools=name.startswith("qwen"), reasoning=False)
    for message in (message for row in rows for message in row["messages"] if message["role"] == "assistant"):
        message["content"] = (message["content"] or "").lstrip()  # TRL tokenises it with the line end before it
    tokenizer = tokenizer_with(trl_template(name), family)
    for row, example in zip(rows, encoded(rows, tokenizer), strict=True):
        ids, mask = by_trl(row, tokenizer, trl_template(f"{name}_training"))
        ours = mask_of(example)
        assert list(example.token_ids) == ids[: len(ours)]
        assert not tokenizer.decode(ids[len(ours) :]).strip()
        different = [token for token, a, b in zip(ids, ours, mask, strict=False) if a != b]
        assert not tokenizer.decode(different).strip()
        assert all(b for a, b in zip(ours, mask, strict=False) if a)


def pieces_of(row: Row, tokenizer: Any, **options: Any) -> list[str]:
    """The row's text, in turn without loss and with it."""
    (example,) = encoded([row], tokenizer, **options)
    assert example.answer_start > 0
    edges = [0, *(edge for span in example.loss_spans for edge in span)]
    assert edges[-1] == len(example.token_ids)
    return [tokenizer.decode(example.token_ids[start:end]) for start, end in itertools.pairwise(edges)]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> Row:
    return {"role": "assistant", "content": text, **fields}


def call(name: str, arguments: Any) -> Row:
    return {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}]}


def answer_of_tool(text: str) -> Row:
    return {"role": "tool", "content": text, "tool_call_id": "c1"}


@cache
def smollm2_template() -> str:
    return str(GGUFReader(demo_file()).fields["tokenizer.chat_template"].contents())


def test_smollm2_loss_is_the_answers_and_the_token_that_ends_each() -> None:
    tokenizer = tokenizer_with(smollm2_template(), "qwen")
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    row = {"messages": [user("one"), assistant("heart"), user("two"), assistant("lung\nfever")]}
    assert pieces_of(row, tokenizer) == [
        f"{system}<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
        "heart<|im_end|>",
        "\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n",
        "lung\nfever<|im_end|>",
    ]
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    before, *_ = pieces_of(row, tokenizer)
    assert before == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    whole = "".join(pieces_of(row, tokenizer))
    first_token = tokenizer.decode([tokenizer(whole)["input_ids"][0]])
    assert pieces_of(row, tokenizer, loss="all") == [first_token, whole.removeprefix(first_token)]
    assert pieces_of(row, tokenizer, loss="last") == [
        whole.removesuffix("lung\nfever<|im_end|>"),
        "lung\nfever<|im_end|>",
    ]


@pytest.mark.parametrize("template", ["CHAT", "llama3_training"])
@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}, {"loss_weight": 0.0}, {"loss": False}])
def test_message_of_weight_zero_is_read_and_not_tuned_on(template: str, field: Row) -> None:
    tokenizer = subwords() if template == "CHAT" else tokenizer_with(trl_template(template), "llama")
    talk = [user("one"), assistant("heart"), user("two"), assistant("lung", **field), user("three"), assistant("fever")]
    plain = [{key: value for key, value in message.items() if key not in field} for message in talk]
    left_out, counted = pieces_of({"messages": talk}, tokenizer), pieces_of({"messages": plain}, tokenizer)
    assert left_out == [*counted[:2], "".join(counted[2:5]), counted[5]]
    assert "lung" not in "".join(pieces_of({"messages": talk}, tokenizer, loss="all")[1::2])
    # Nothing follows the last answer that counts: neither loss nor score depends on it.
    (refused,) = encoded(
        [{"messages": [user("one"), assistant("heart", weight=1), user("Sure?"), assistant("no", **field)]}], tokenizer
    )
    (alone,) = encoded([{"messages": [user("one"), assistant("heart")]}], tokenizer)
    assert refused == alone


def test_row_without_a_message_that_counts_is_told() -> None:
    with pytest.raises(DataError, match=r"^f:1: no assistant message counts \(weight is 0\)"):
        encoded([{"messages": [user("one"), assistant("heart", weight=0)]}], subwords())
    with pytest.raises(DataError, match=r"^f:1: messages\[1\]\.weight is 0\.5"):
        encoded([{"messages": [user("one"), assistant("heart", weight=0.5)]}], subwords())


@pytest.mark.parametrize("arguments", [{"n": 2}, '{"n":2}'])
@pytest.mark.parametrize("content", ["", None])
def test_tools_and_calls_go_to_the_template(arguments: Any, content: Any) -> None:
    talk = [user("one"), assistant(content, **call("look_up", arguments)), answer_of_tool("12"), assistant("heart")]
    row = {"messages": talk, "tools": TOOLS}
    for name, family, written in (
        (
            "qwen3_instruct_2507",
            "qwen",
            '<tool_call>\n{"name": "look_up", "arguments": {"n": 2}}\n</tool_call><|im_end|>',
        ),
        ("llama3_1", "llama", '{"name": "look_up", "parameters": {"n": 2}}<|eot_id|>'),
    ):
        tokenizer = tokenizer_with(trl_template(name), family)
        before, called, between, answered = pieces_of(row, tokenizer)
        assert called == written
        assert "look_up for a part" in before
        assert "12" in between
        assert answered.startswith("heart")
        # A chat may end with the call; what generation starts from has the tools, too.
        record = record_from_row({"messages": talk[:2], "tools": json.dumps(TOOLS)}, source="f:1")
        assert tokenizer.decode(encode_prompts([record], tokenizer)[0]) == before
        assert json.loads(record.completion.splitlines()[-1])["name"] == "look_up"
        assert pieces_of({"messages": talk[:2], "tools": TOOLS}, tokenizer) == [before, called]


@pytest.mark.parametrize("arguments", [{"n": 2}, '{"n": 2}'])
def test_calls_go_to_a_template_that_wants_their_arguments_as_text(arguments: Any) -> None:
    """DeepSeek's, which writes no tools: those belong into a system message."""
    tokenizer = tokenizer_with(trl_template("deepseekv3"), "deepseek")
    talk = [user("one"), assistant(None, **call("look_up", arguments)), answer_of_tool("12"), assistant("heart")]
    called, answered = pieces_of({"messages": [*talk, user("two"), assistant("lung")]}, tokenizer)[1:5:2]
    assert 'function<｜tool▁sep｜>look_up\n```json\n{"n": 2}\n```' in called
    assert answered == "heart<｜end▁of▁sentence｜>"
    with pytest.raises(
        DataError, match=r"^f:1: .* does not write tools; write what they say .*tools into a system mess"
    ):
        encoded([{"messages": talk, "tools": TOOLS}], tokenizer)


def test_names_and_roles_that_a_template_leaves_out_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    two = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.role + m.content + eos_token }}{% endif %}"
    )
    talk = [{"role": "system", "content": "Be brief."}, {**user("one"), "name": "Ann"}, assistant("heart")]
    encoded([{"messages": talk}] * 3, subwords(chat=two + "{% endfor %}"))
    assert caplog.messages == [
        f"{field} is not written by the chat template, so it is not tuned on (3 rows)" for field in ("name", "system")
    ]
    caplog.clear()
    encoded([{"messages": [talk[1], assistant("heart", thinking="a sign")]}], subwords(), template="raw")
    assert caplog.messages == ["thinking is not written without a chat template, so it is not tuned on (1 rows)"]


def test_rows_that_a_template_refuses_are_counted() -> None:
    template = "{% for m in messages %}{% if m.content == 'x' %}{{ raise_exception('no x') }}{% endif %}{{ m.content }}"
    rows = [{"messages": [user("x" if n in (3, 5, 8, 9) else "y"), assistant("heart")]} for n in range(12)]
    with pytest.raises(DataError, match=r"^f:4: .*refuses these messages \(no x\)") as refused:
        encoded(rows, subwords(chat=template + "{% endfor %}"))
    assert "(4 of 12 rows cannot be used, also f:6: " in str(refused.value)
    assert "f:10" not in str(refused.value)


def test_template_that_takes_no_tools_refuses_them_in_one_line() -> None:
    plain, called = assistant("heart"), assistant(None, **call("look_up", {}))
    with pytest.raises(DataError, match=r"^f:1: the tokenizer's chat template does not write tools;"):
        encoded([{"messages": [user("one"), plain], "tools": TOOLS}], subwords())
    for template, options in ((CHAT, {}), (trl_template("phi3_5"), {})):
        with pytest.raises(DataError, match=r"^f:1: the tokenizer's chat template does not write tool_calls;"):
            encoded([{"messages": [user("one"), called, user("12"), plain]}], subwords(chat=template), **options)


@pytest.mark.parametrize("renames", [True, False])
def test_answers_are_found_where_a_template_leaves_out_earlier_reasoning(
    renames: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether transformers gives reasoning under each of its names, as 5.23 does, or not, as 5.17."""
    if not renames:
        names = "transformers.utils.chat_template_utils._alias_reasoning_fields"
        monkeypatch.setattr(names, lambda chat: chat, raising=False)
    thought = {"reasoning_content": "a sign"}
    two_turns = [user("one"), assistant("heart", **thought), user("two"), assistant("lung", **thought)]
    tokenizer = tokenizer_with(trl_template("qwen3"), "qwen")
    assert pieces_of({"messages": two_turns}, tokenizer)[1::2] == [
        "heart<|im_end|>", "<think>\na sign\n</think>\n\nlung<|im_end|>",
    ]  # fmt: skip
    called = [user("one"), assistant(None, **call("look_up", {}), **thought), answer_of_tool("12"), assistant("heart")]
    talk = {"messages": [*called, *two_turns[2:]], "tools": TOOLS}
    assert pieces_of(talk, tokenizer)[1::2] == [
        '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call><|im_end|>',
        "heart<|im_end|>",
        "<think>\na sign\n</think>\n\nlung<|im_end|>",
    ]
    gpt_oss = tokenizer_with(trl_template("gptoss"), "gptoss")
    assert pieces_of({"messages": two_turns}, gpt_oss)[1::2] == [
        "<|channel|>final<|message|>heart<|end|>",
        "<|channel|>analysis<|message|>a sign<|end|><|start|>assistant<|channel|>final<|message|>lung<|return|>",
    ]
    with pytest.raises(DataError, match=r"^f:1: messages\[1\] cannot be found in what .*data\.loss=last"):
        pieces_of(talk, gpt_oss)
    assert pieces_of(talk, gpt_oss, loss="last")[1].endswith("lung<|return|>")
    assert not caplog.messages
    pieces_of({"messages": two_turns}, tokenizer_with(trl_template("llama3"), "llama"))
    assert caplog.messages == ["reasoning_content is not written by the chat template, so it is not tuned on (1 rows)"]


def test_turn_without_an_end_of_its_own_ends_with_the_next_speaker() -> None:
    tokenizer = tokenizer_with(trl_template("glm4moe"), "gptoss")
    row = {"messages": [user("one"), assistant("heart"), user("two"), assistant("lung")]}
    assert pieces_of(row, tokenizer)[1::2] == ["\n<think></think>\nheart<|user|>", "\n<think></think>\nlung<|return|>"]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_training", "llama3"])
def test_answer_is_asked_for_where_it_is_tuned_on(name: str) -> None:
    """Behind an empty thought, if the template writes one before an answer without reasoning."""
    tokenizer = tokenizer_with(trl_template(name), "llama" if name == "llama3" else "qwen")
    row = {"messages": [user("one"), assistant("heart"), user("two"), assistant("lung")]}
    (example,), (ids,) = encoded([row], tokenizer), encode_prompts([record_from_row(row, source="f:1")], tokenizer)
    before, asked = tokenizer.decode(example.token_ids), tokenizer.decode(ids)
    assert before.removeprefix(asked).startswith("lung")
    assert name == "qwen3_5_think" or list(example.token_ids[: len(ids)]) == ids
    row["messages"][-1]["reasoning_content"] = "a sign"
    (thought,) = encode_prompts([record_from_row(row, source="f:1")], tokenizer)
    assert thought == tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True)["input_ids"]
