"""Scorers equal reference libraries on a thousand random pairs."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from prunetune.data.records import Record
from prunetune.errors import ConfigError, DataError, MissingPackage
from prunetune.evaluation.results import Item
from prunetune.evaluation.statistics import aggregate_items
from prunetune.evaluation.suites.protocol import Prompt, Response
from prunetune.evaluation.suites.scorers import SCORERS, parse_scorers

WORDS = [
    *[
        "the",
        "a",
        "of",
        "court",
        "held",
        "that",
        "Motion",
        "denied,",
        "granted;",
        "§12",
        "naïve",
        "3.5",
        "patient's",
        "fever",
        "cough",
        "—",
        "not",
        "don't",
    ],
    "漢字",
]
MANY = 1000


def random_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, 14))) + rng.choice(["", ".", "\n", " ?"])


def perturbed(text: str, rng: random.Random) -> str:
    """The text with some words removed, doubled or swapped; sometimes another text."""
    if rng.random() < 0.2:
        return random_text(rng)
    words = [word for word in text.split() for _ in range(rng.choice([0, 1, 1, 1, 2]))]
    return " ".join(words if rng.random() < 0.7 else reversed(words))


def pairs() -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    expected = [random_text(rng) for _ in range(MANY)]
    return expected, [perturbed(text, rng) for text in expected]


EXPECTED, GOT = pairs()


def answered(expected: str, got: str, index: int = 0, **fields: Any) -> Response:
    record = Record(kind="completion", prompt="p", completion=expected, id=str(index))
    return Response(Prompt(record, (), fields), text=got)


ANSWERS = [answered(*pair, index) for index, pair in enumerate(zip(EXPECTED, GOT, strict=True))]


def values(scorer: str, answers: list[Response] = ANSWERS, **options: Any) -> dict[str, list[float]]:
    (use,) = parse_scorers({scorer: options}, "test")
    return use.score(answers)


def as_items(metric: str, scores: list[float]) -> list[Item]:
    return [
        Item(str(index), "", expected, answer, None, {metric: value})
        for index, (expected, answer, value) in enumerate(zip(EXPECTED, GOT, scores, strict=True))
    ]


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_of_ascii_equals_rouge_score(stemmer: bool) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    plain = [response for response in ANSWERS if (response.prompt.expected + response.text).isascii()]
    assert len(plain) > 50
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    theirs = [scorer.score(response.prompt.expected, response.text) for response in plain]
    ours = values("rouge", plain, stemmer=stemmer)
    for metric, name in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert ours[metric] == [scores[name].fmeasure for scores in theirs]


def test_rouge_scores_other_scripts() -> None:
    chinese = [answered("答案是北京", "答案是北京"), answered("答案是北京", "答案是南京")]
    scores = values("rouge", chinese)
    assert {scores[metric][0] for metric in scores} == {1.0}
    assert scores["rouge_1"][1] == scores["rouge_l"][1] == pytest.approx(0.8)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_bleu_and_chrf_equal_sacrebleu_item_by_item_and_as_a_corpus(metric: str) -> None:
    import sacrebleu

    sentence = {"bleu": sacrebleu.sentence_bleu, "chrf": sacrebleu.sentence_chrf}[metric]
    corpus = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[metric]
    ours = values(metric)[metric]
    assert ours == [sentence(have, [want]).score for want, have in zip(EXPECTED, GOT, strict=True)]
    score = aggregate_items(as_items(metric, ours), metric)
    assert score.value == pytest.approx(corpus(GOT, [EXPECTED]).score, abs=1e-9)
    assert 0 < score.se < 5


def test_corpus_in_a_resample_is_the_corpus_of_its_items() -> None:
    import sacrebleu

    from prunetune.evaluation.statistics import statistic_for_metric

    weights = np.random.default_rng(0).multinomial(MANY, np.full(MANY, 1 / MANY), size=1).astype(float)
    drawn = [index for index, count in enumerate(weights[0]) for _ in range(int(count))]
    make = statistic_for_metric("bleu")
    assert make is not None
    bleu = make(as_items("bleu", [0.0] * MANY))(weights)[0]
    theirs = sacrebleu.corpus_bleu([GOT[index] for index in drawn], [[EXPECTED[index] for index in drawn]])
    assert bleu == pytest.approx(theirs.score, abs=1e-9)


@pytest.mark.parametrize("metric", ["macro_f1", "label_f1"])
def test_macro_f1_equals_scikit_learn(metric: str) -> None:
    rng = random.Random(1)
    labels = ["yes", "no", "maybe", "other"]
    expected = rng.choices(labels[:3], k=MANY)
    answers = [rng.choice(labels) if rng.random() < 0.4 else label for label in expected]
    items = [
        Item(str(n), "", want, have, None, {"accuracy": float(want == have), "label_f1": float(want == have)})
        for n, (want, have) in enumerate(zip(expected, answers, strict=True))
    ]
    theirs = f1_score(expected, answers, average="macro", labels=sorted({*expected, *answers}), zero_division=0)
    assert aggregate_items(items, metric).value == pytest.approx(theirs, abs=1e-12)


def test_token_f1_equals_the_rule_of_squad() -> None:
    def squad(expected: str, got: str) -> float:
        """Token F1 as the paper of SQuAD 1.1 describes its evaluation script."""
        import re
        import string

        def tokens(text: str) -> list[str]:
            text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
            return re.sub(r"\b(a|an|the)\b", " ", text).split()

        want, have = tokens(expected), tokens(got)
        same = sum((Counter(want) & Counter(have)).values())
        if not want or not have:
            return float(want == have)
        if same == 0:
            return 0.0
        precision, recall = same / len(have), same / len(want)
        return 2 * precision * recall / (precision + recall)

    theirs = [squad(want, have) for want, have in zip(EXPECTED, GOT, strict=True)]
    assert values("token_f1")["token_f1"] == pytest.approx(theirs, abs=1e-12)
    assert values("token_f1", [answered("The cat.", "a cat")])["token_f1"] == [1.0]


def test_json_equals_jsonschema() -> None:
    import jsonschema

    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 0}}}
    rng = random.Random(2)
    replies = [
        rng.choice(
            [json.dumps({"n": rng.choice([1, -1, 2.5, "x", None])}), "{", "[]", "", "{}", '{"n": 1} tail', "NaN"]
        )
        for _ in range(MANY)
    ]

    def fits(text: str) -> float:
        try:
            jsonschema.validate(json.loads(text), schema)
        except (ValueError, jsonschema.ValidationError):
            return 0.0
        return 1.0

    scores = values("json_schema", [answered("", text) for text in replies], schema=schema)["json_schema"]
    assert scores == [fits(text) for text in replies]
    assert 0 < sum(scores) < MANY
    assert values("json_schema", [answered("", "[" * 100_000)], schema=schema)["json_schema"] == [0.0]
    with pytest.raises(ConfigError, match="not a JSON schema"):
        values("json_schema", schema={"type": "objekt"})


@pytest.mark.parametrize(
    ("scorer", "options", "expected", "got", "score"),
    [
        ("exact_match", {}, "New York", "new  york ", 1.0),
        ("exact_match", {"strict": True}, "New York", "new york", 0.0),
        ("exact_match", {}, "a", "", 0.0),
        ("contains", {}, "Fever", "high fever, cough", 1.0),
        ("contains", {"any": ["flu", "cold"]}, "", "a Cold", 1.0),
        ("contains", {"all": ["flu", "cold"]}, "", "a cold", 0.0),
        ("contains", {"any": "flu"}, "", "", 0.0),
        ("regex", {"pattern": r"\d{3}"}, "", "call 911", 1.0),
        ("regex", {"pattern": "yes"}, "", "YES", 0.0),
        ("regex", {"pattern": "yes", "ignore_case": True}, "", "YES", 1.0),
        ("regex", {"pattern": r"#### (\d+)"}, "42", "so #### 42", 1.0),
        ("regex", {"pattern": r"#### (\d+)"}, "42", "so #### 7", 0.0),
        ("regex", {"pattern": r"#### (\d+)?"}, "42", "so #### ", 0.0),
    ],
)
def test_each_scorer_marks_right_and_wrong_answers(
    scorer: str, options: dict[str, Any], expected: str, got: str, score: float
) -> None:
    (scores,) = values(scorer, [answered(expected, got)], **options).values()
    assert scores == [score]


def test_empty_answers_score_zero() -> None:
    empty = [answered("a fever", ""), answered("§", "")]
    for scorer in ("rouge", "bleu", "chrf", "token_f1", "exact_match", "label_f1", "contains"):
        for scores in values(scorer, empty).values():
            assert scores[0] == 0.0
            assert all(math.isfinite(value) for value in scores)
    items = [Item(str(n), "", response.prompt.expected, "", None, {"bleu": 0.0}) for n, response in enumerate(empty)]
    assert aggregate_items(items, "bleu").value == 0.0


def double(got: str, expected: str, row: Any) -> float:
    return 2.0 * (got == expected) + row.get("bonus", 0)


def broken(got: str, expected: str, row: Any) -> str:
    if got == "raise":
        raise KeyError("no\nsuch key")
    return "much"


def test_python_scorer_calls_a_function_by_its_name() -> None:
    module = __name__
    responses = [answered("a", "a", bonus=1), answered("a", "b")]
    assert values("python", responses, function=f"{module}:double") == {"python": [3.0, 0.0]}
    assert values("python", responses, function=f"{module}:double", name="mine") == {"mine": [3.0, 0.0]}
    for name in ("nowhere:double", f"{module}:nothing", f"{module}:WORDS", module, ":"):
        with pytest.raises(ConfigError, match=r"python: .* cannot be imported|name a function"):
            values("python", responses, function=name)
    with pytest.raises(DataError, match=r"failed on item 0: KeyError: 'no\\nsuch key'"):
        values("python", [answered("", "raise")], function=f"{module}:broken")
    with pytest.raises(DataError, match="has to give a number"):
        values("python", responses, function=f"{module}:broken")


def test_python_scorer_imports_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prunetune_own_scorer.py").write_text("def long(got, expected, row): return len(got) > 2\n")
    monkeypatch.chdir(tmp_path)
    responses = [answered("", "abc"), answered("", "a")]
    assert values("python", responses, function="prunetune_own_scorer:long") == {"python": [1.0, 0.0]}
    assert str(tmp_path) not in sys.path


def test_scorer_used_twice_needs_two_names() -> None:
    uses = parse_scorers(
        [{"regex": {"pattern": "a", "name": "one"}}, {"regex": {"pattern": "b", "name": "two"}}], "test"
    )
    assert [use.metrics for use in uses] == [("one",), ("two",)]
    assert uses[1].score([answered("", "b")]) == {"two": [1.0]}


def test_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, scorer, options in (
        ("sacrebleu", "bleu", {}),
        ("jsonschema", "json_schema", {"schema": {"type": "null"}}),
    ):
        for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingPackage, match="pip install 'jsonschema>="):
            values(scorer, **options)


def test_every_scorer_has_a_docstring() -> None:
    for scorer in SCORERS.values():
        assert scorer.score.__doc__
