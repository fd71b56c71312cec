"""The chat: answers of a pipe and of a terminal, two models, Ctrl-C, hostile output, no template, long questions."""

from __future__ import annotations

import builtins
import io
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prunetune.cli import chat as chat_module
from prunetune.cli.chat import ChatModel
from prunetune.cli.chat_options import ChatOptions
from prunetune.data.batches import pad_token_id
from prunetune.data.encoding import encode_prompts
from prunetune.data.records import Message, Record
from prunetune.errors import DataError
from prunetune.evaluation.generation import generate_ids
from prunetune.evaluation.scoring_mode import evaluation_mode
from prunetune.utils.untrusted import printable
from support.data import subwords
from support.finished_run import copied_run, finished_run
from support.models import tiny

Say = Callable[..., tuple[int, str, str]]
OPTIONS = ("--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a text what the next command reads."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def greedy(model: Any, tokenizer: Any, question: str, *, chat: bool = True) -> str:
    """The answer as runs and suites generate it."""
    record = Record(kind="chat", messages=(Message("user", question),)) if chat else Record("completion", question)
    prompts = encode_prompts([record], tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 6, "max_tokens": 10**6, "tick": lambda _: None}
    with evaluation_mode(model):
        answers = generate_ids(model, tokenizer, prompts, chats=[chat], pad_id=pad_token_id(tokenizer), **options)
    (text,) = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return text


def opened(name: str = "model", **options: Any) -> ChatModel:
    """A tiny model to chat with."""
    model = tiny(vocab_size=320, max_position_embeddings=256)
    return ChatModel(name, model, subwords(), ChatOptions(max_new_tokens=6, **options))


def test_each_line_of_a_pipe_is_answered_as_a_suite_would(say: Say, pipe: Callable[[str], None]) -> None:
    pipe("question 3\n\n  \nanswer yes")
    code, out, _ = say("chat", finished_run(), *OPTIONS)
    run = finished_run()
    model, tokenizer = run.model(device="cpu", dtype="float32"), run.tokenizer()
    expected = [printable(greedy(model, tokenizer, text)) for text in ("question 3", "answer yes")]
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))


def test_dense_is_the_tuned_model_or_else_the_base_and_says_which(
    say: Say, pipe: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "prunetune")
    run = copied_run(tmp_path)
    for title, name, words in (
        ("dense, tuned", "tuned", "the dense model, tuned on the run's data"),
        ("dense, untuned", "dense", "the untuned dense model: the run has no tuned one"),
    ):
        pipe("question 3\n")
        code, out, _ = say("chat", run, "--against", "dense", *OPTIONS)
        model = finished_run().model(name, device="cpu", dtype="float32")  # type: ignore[arg-type]
        answer = printable(greedy(model, run.tokenizer(), "question 3"))
        assert (code, words in caplog.text) == (0, True)
        assert out.startswith("pruned:\n")
        assert out.partition(f"\n{title}:\n")[2] == f"{answer}\n"
        shutil.rmtree(run / "tuned", ignore_errors=True)


def test_any_two_models_can_be_compared(say: Say, pipe: Callable[[str], None]) -> None:
    folder = str(finished_run() / "model")
    pipe("question 3\n")
    code, out, _ = say("chat", finished_run(), "--against", folder, *OPTIONS)
    first, second = re.findall(r"^(.*)\n(?:.*/model:\n|$)", out.partition("\n")[2])[:1][0], out.splitlines()[-1]
    assert (code, first) == (0, second)


def test_text_is_continued_without_a_chat_template(
    say: Say, pipe: Callable[[str], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "prunetune")
    subwords(chat=None).save_pretrained(tmp_path / "plain")
    tiny(vocab_size=320).save_pretrained(tmp_path / "plain")
    pipe("question 3\n")
    code, out, _ = say("chat", tmp_path / "plain", *OPTIONS)
    assert (code, "is continued as a text" in caplog.text) == (0, True)
    assert out == printable(greedy(tiny(vocab_size=320), subwords(chat=None), "question 3", chat=False)) + "\n"
    pipe("question 3\n")
    assert say("chat", tmp_path / "plain", "--template", "raw", *OPTIONS)[1] == out
    pipe("question 3\n")
    code, _, _ = say("chat", tmp_path / "plain", "--template", "chat", *OPTIONS)
    assert (code, "need a chat template" in caplog.text) == (2, True)


def test_line_that_does_not_fit_is_named_and_the_others_are_answered(
    say: Say, pipe: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    pipe("question 3\n" + "fever and cough " * 200 + "\nquestion 3\n")
    code, out, err = say("chat", finished_run(), *OPTIONS)
    assert (code, len(out.splitlines())) == (2, 2)
    assert re.search(r"the question has \d+ tokens, and the context leaves room for \d+: shorten it", caplog.text)
    assert "1 questions could not be asked" in err


def test_conversation_forgets_its_oldest_turns_when_the_context_is_full() -> None:
    model = opened(system="answer yes")
    asked = [f"fever {number} " * 8 for number in range(12)]
    for question in asked:
        model.answer(question, lambda _: None)
    remembered = [turn.content for turn in model.turns if turn.role == "user"]
    assert remembered == asked[-len(remembered) :]
    assert 1 < len(remembered) < len(asked)
    with pytest.raises(DataError, match="shorten it"):
        model.answer("fever " * 300, lambda _: None)


def test_output_of_a_model_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shown = opened(), list[str]()
    monkeypatch.setattr(type(model.tokenizer), "decode", lambda *_, **__: "\x1b]0;owned\x07 \x1b[2Jhi\u202e \n")
    model.answer("question 3", shown.append)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", "".join(shown))
    assert r"\x1b[2Jhi" in "".join(shown)


def test_ctrl_c_ends_the_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shown = opened(), list[str]()

    def interrupted(*_: Any, streamer: Any, **__: Any) -> None:
        for ids in ([[5, 6]], [40], [41]):
            streamer.put(torch.tensor(ids))
        raise KeyboardInterrupt(*numbers)

    numbers: tuple[int, ...] = ()
    monkeypatch.setattr(chat_module, "generate_ids", interrupted)
    assert model.answer("question 3", shown.append).startswith("2 tokens")
    begun = subwords().decode([40, 41])
    assert model.turns == [Message("user", "question 3"), Message("assistant", begun)]
    numbers = (15,)  # SIGTERM
    with pytest.raises(KeyboardInterrupt):
        model.answer("question 3", shown.append)


def typed(monkeypatch: pytest.MonkeyPatch, lines: Iterable[str | BaseException]) -> None:
    """Make standard input and output a terminal, at which these lines are typed; then Ctrl-D."""
    remaining = iter([*lines, EOFError()])

    def read(_: str) -> str:
        line = next(remaining)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)


@pytest.mark.parametrize("width", [60, 120])
def test_terminal_shows_both_answers_whatever_its_width(width: int, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, ["question 3", "/new", ""])
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    code, out, _ = say("chat", finished_run(), "--against", "dense", *OPTIONS)
    out = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out)
    assert code == 0
    assert out.startswith("Ctrl-C stops an answer")
    assert ("pruned:" in out, bool(re.search("pruned +dense, tuned", out))) == (width == 60, width == 120)
    assert len(re.findall(r"\d+ tokens, [\d.]+ a second", out)) >= 2


def test_ctrl_c_at_the_prompt_ends_the_chat(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, [KeyboardInterrupt()])
    code, _, err = say("chat", finished_run(), *OPTIONS)
    assert (code, err.splitlines()[-1]) == (130, "prunetune: interrupted")


def test_columns_hold_all_of_long_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [opened("one"), opened("two")]
    words = [f"word{number}" for number in range(300)]

    def answer(_: Any, question: str, show: Callable[[str], None]) -> str:
        for word in words:
            show(f"{word} ")
        return "300 tokens"

    monkeypatch.setattr(ChatModel, "answer", answer)
    console = Console(file=io.StringIO(), width=120, height=20)
    chat_module._ask_in_columns(models, "?", console, True)
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(page.count(f"{word} ") + page.count(f"{word}\n") >= 2 for word in words)
    assert max(map(len, page.splitlines())) <= 120


def test_what_cannot_be_opened_is_said_before_the_first_question(
    say: Say, pipe: Callable[[str], None], tmp_path: Path
) -> None:
    for arguments, message in (
        ((tmp_path / "absent",), "not a model folder"),
        ((finished_run(), "--against", tmp_path / "absent"), "not a model folder"),
        ((finished_run() / "model", "--against", "dense"), "is no run folder"),
        ((finished_run(), "--max-new-tokens", 0), "max_new_tokens"),
        ((finished_run(), "--device", "cuda:9"), "not available"),
    ):
        pipe("question 3\n")
        code, out, err = say("chat", *arguments)
        assert (code, out, message in err) == (2, "", True), err
