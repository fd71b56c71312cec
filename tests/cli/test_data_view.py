"""`prunetune data`: rows as the model sees them, what the loss counts, lengths, and what a file is read as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prunetune.utils.tables import MIN_WIDTH
from support.data import pairs, subwords, write_lines
from support.models import tiny

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model with a context of 128 tokens and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny(vocab_size=400).save_pretrained(folder)
    subwords().save_pretrained(folder)
    return folder


def test_data_shows_three_rows_as_texts_with_the_loss_marked(say: Say, tmp_path: Path) -> None:
    rows = [{"question": f"q{n} [b]x[/b]\x1b[31m?", "answer": "a" * (n + 1), "label": 1} for n in range(5)]
    file = write_lines(tmp_path / "rows.jsonl", *rows)
    code, out, err = say("data", file)
    blocks = out.rstrip("\n").split("\n\n")
    assert (code, err) == (0, "")
    assert blocks == [
        f"{file}: 5 question/answer rows; prompt from question, completion from answer; not used: label (5 rows)",
        *(f"{file}:{n + 1}\nq{n} [b]x[/b]\\x1b[31m?\n⟦{'a' * (n + 1)}␃⟧" for n in range(3)),
        "characters of a row: 20 to 24, half have 22 at most; --model M shows its tokens",
    ]
    assert len(str(tmp_path)) + 100 > MIN_WIDTH  # the first line is longer than a terminal, and was not broken


def test_data_shows_tokens_of_a_model_and_counts_what_is_too_long(say: Say, model: Path, tmp_path: Path) -> None:
    chat = {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]}
    long = {"prompt": "p " * 200, "completion": "c"}
    choice = {"prompt": "Which?", "choices": [" yes", " no"], "answer": "B"}
    file = write_lines(tmp_path / "rows.jsonl", chat, choice, long)
    code, out, _ = say("data", file, "--model", model)
    assert code == 0
    assert "\n<s><|user|>Where?<|end|>\n<|assistant|>⟦Here.<|end|>⟧\n" in out
    assert "\n<s>Which?⟦ no</s>⟧\nchoices: ' yes', ' no'\n" in out
    assert "; 1 are longer than 128 (data.too_long)" in out
    assert "; 3 are longer than 2 (data.too_long)" in say("data", file, "--model", model, "--data.max-length", 2)[1]
    assert "<|user|>Which?<|end|>" in say("data", file, "--model", model, "--data.template", "chat")[1]


def test_data_takes_the_options_of_a_recipe(say: Say, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", {"frage": "Wo?", "antwort": "Da."}, {"frage": "Wann?", "antwort": ""})
    columns = ("--data.columns.prompt", "frage", "--data.columns.completion", "antwort")
    code, out, err = say("data", file, *columns)
    assert (code, out) == (2, "")
    assert "rows.jsonl:2: completion is empty" in err
    code, out, _ = say("data", file, *columns, "--data.bad_rows", "drop")
    assert (code, out.split("\n\n")[0]) == (0, f"{file}: 1 mapped rows; prompt from frage, completion from antwort")


@pytest.mark.parametrize(
    "arguments", [(), ("none.jsonl",), ("rows.jsonl", "--model", "./none"), ("rows.jsonl", "--dat", "x")]
)
def test_data_is_refused_in_one_line(
    arguments: tuple[str, ...], say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl", *pairs(2))
    code, out, err = say("data", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
