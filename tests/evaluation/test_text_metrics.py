"""Exact match ignores case and white space, and ROUGE-L compares words in any script."""

from __future__ import annotations

import random
import string
import unicodedata

import pytest

from prunetune.data.records import Record
from prunetune.evaluation.suites.protocol import Prompt, Response
from prunetune.evaluation.suites.text_scorers import rouge
from prunetune.evaluation.text_metrics import RougeTokenizer, exact_match


def rouge_l(expected: list[str], texts: list[str]) -> list[float]:
    """ROUGE-L F1 of each pair, as the scorer gives it."""
    prompts = [Prompt(Record(kind="completion", completion=completion), (), {}) for completion in expected]
    answers = [Response(prompt, text=text) for prompt, text in zip(prompts, texts, strict=True)]
    return rouge(answers, {"stemmer": False})["rouge_l"]


def test_case_and_white_space_do_not_matter() -> None:
    assert exact_match("The  Heart\n", " the heart")
    assert not exact_match("the heart", "the heart.")


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    same, half, none = rouge_l(["a b c d", "a b c d", "a b c d"], ["a b c d", "a x c y", "w x y z"])
    assert same == 1.0
    assert half == pytest.approx(0.5)
    assert none == 0.0
    assert rouge_l(["something"], [""]) == [0.0]


@pytest.mark.parametrize("stemmer", [False, True])
def test_words_of_ascii_are_those_of_rouge_score(stemmer: bool) -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    rng, theirs, ours = random.Random(0), DefaultTokenizer(stemmer), RougeTokenizer(stemmer=stemmer)
    likely = [*string.printable, *" _-.'" * 4, "running", "flies", "ponies", "s_t", "\x00", "\x7f"]
    for _ in range(2000):
        text = "".join(rng.choices(likely, k=rng.randint(0, 30)))
        assert ours.tokenize(text) == theirs.tokenize(text)
        # Company of another script changes nothing about them.
        assert ours.tokenize(f"{text} мир") == [*theirs.tokenize(text), "мир"]


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("今天天气很好", "今天天气不好"),
        ("Привет, мир", "Привет, Рим"),
        ("กินข้าวที่นี่", "กินข้าวที่นั่น"),
        ("ที่", "ที้"),  # nothing but a tone mark
        ("これはペンです", "これは本です"),
        ("안녕 세계", "안녕 하늘"),
        ("मैं हिन्दी", "मैं हिन्दु"),
        ("für Äpfel", "fur Apfel"),
        ("für Äpfel", "fär Öpfel"),
    ],
)
def test_rouge_l_scores_every_script(text: str, other: str) -> None:
    same, decomposed, different = rouge_l([text] * 3, [text, unicodedata.normalize("NFD", text), other])
    assert same == decomposed == 1.0
    assert different < 1


def test_rouge_splits_scripts_without_spaces_into_characters() -> None:
    assert RougeTokenizer().tokenize("Für ÄPFEL_und don't") == ["für", "äpfel", "und", "don", "t"]
    assert RougeTokenizer().tokenize("GPT-4模型 ที่1, हिन्दी。") == ["gpt", "4", "模", "型", "ที่", "1", "हिन्दी"]
    assert RougeTokenizer(stemmer=True).tokenize("running äpfeln") == ["run", "äpfeln"]
    assert rouge_l(["…", ""], ["…", "。"]) == [0.0, 0.0]  # no word, nothing in common
