"""Scores of written answers: each takes answers and a scorer's options, and gives every item its value by metric."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prunetune.errors import ConfigError
from prunetune.evaluation.corpus import sentence_bleu, sentence_chrf
from prunetune.evaluation.suites.protocol import Answered
from prunetune.evaluation.text import Words, normalised
from prunetune.evaluation.text import exact_match as equal
from prunetune.utils.optional import require

Options = Mapping[str, Any]
Values = dict[str, list[float]]  # metric -> one value an item

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(answers: Sequence[Answered], options: Options) -> Values:
    """1 where answer and reference are equal but for case and white space; to the letter where `strict`."""
    if options["strict"]:
        return {"exact_match": [float(each.posed.expected.strip() == each.got) for each in answers]}
    return {"exact_match": [float(equal(each.posed.expected, each.got)) for each in answers]}


def label(answers: Sequence[Answered], options: Options) -> Values:
    """1 where a written label is the right one; the task's score is the mean F1 over labels."""
    return {"label_f1": [float(equal(each.posed.expected, each.got)) for each in answers]}


def contains(answers: Sequence[Answered], options: Options) -> Values:
    """1 where the answer holds the reference, or one of `any`, and all of `all`; case and white space do not count."""
    some, every = list(options["any"]), list(options["all"])

    def holds(answer: Answered) -> float:
        got = normalised(answer.got)
        wanted = some or ([] if every else [answer.posed.expected])
        found = not wanted or any(normalised(text) in got for text in wanted)
        return float(found and all(normalised(text) in got for text in every))

    return {"contains": [holds(answer) for answer in answers]}


def regex(answers: Sequence[Answered], options: Options) -> Values:
    """1 where the pattern is found; where it has a group, what the group holds must equal the reference."""
    pattern = pattern_of(options)

    def matches(answer: Answered) -> float:
        found = pattern.search(answer.got)
        if found is None or not pattern.groups:
            return float(found is not None)
        return float(equal(answer.posed.expected, found[1] or ""))

    return {"regex": [matches(answer) for answer in answers]}


def pattern_of(options: Options) -> re.Pattern[str]:
    """The compiled pattern; raises `ConfigError`."""
    try:
        return re.compile(options["pattern"], re.IGNORECASE if options["ignore_case"] else 0)
    except re.error as broken:
        raise ConfigError(f"regex: pattern {options['pattern']!r} is not a regular expression ({broken})") from broken


def json_schema(answers: Sequence[Answered], options: Options) -> Values:
    """1 where the answer is JSON and fits the schema (jsonschema)."""
    jsonschema = require("jsonschema", extra="eval", use="scorer json_schema")
    kind = jsonschema.validators.validator_for(options["schema"], default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(options["schema"])
    except jsonschema.SchemaError as broken:
        raise ConfigError(f"json_schema: not a JSON schema: {broken.message}") from broken
    validator = kind(options["schema"])

    def fits(text: str) -> float:
        try:
            return float(validator.is_valid(json.loads(text)))
        except (ValueError, RecursionError):
            return 0.0

    return {"json_schema": [fits(answer.got) for answer in answers]}


def token_f1(answers: Sequence[Answered], options: Options) -> Values:
    """F1 of the words that answer and reference share, without case, punctuation and articles (as for SQuAD 1.1)."""

    def score(expected: str, got: str) -> float:
        wanted, found = words(expected), words(got)
        shared = sum((Counter(wanted) & Counter(found)).values())
        if not wanted or not found:
            return float(wanted == found)
        return 2 * shared / (len(wanted) + len(found))

    return {"token_f1": [score(answer.posed.expected, answer.got) for answer in answers]}


def words(text: str) -> list[str]:
    """The words that count."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", plain).split()


def rouge(answers: Sequence[Answered], options: Options) -> Values:
    """ROUGE-1, -2 and -L F1 in 0..1 (rouge_score) over `Words`; 0 where a side has none."""
    rouge_scorer = require("rouge_score.rouge_scorer", extra="eval", use="scorer rouge")
    scorer = rouge_scorer.RougeScorer(list(ROUGE.values()), tokenizer=Words(stemmer=options["stemmer"]))
    found = [scorer.score(answer.posed.expected, answer.got) for answer in answers]
    return {metric: [float(scores[name].fmeasure) for scores in found] for metric, name in ROUGE.items()}


def bleu(answers: Sequence[Answered], options: Options) -> Values:
    """Sentence BLEU of each item; the task's score is corpus BLEU, 0..100 (sacrebleu)."""
    return {"bleu": sentence_bleu(*_pairs(answers))}


def chrf(answers: Sequence[Answered], options: Options) -> Values:
    """Sentence chrF2 of each item; the task's score is that of the corpus, 0..100 (sacrebleu)."""
    return {"chrf": sentence_chrf(*_pairs(answers))}


def _pairs(answers: Sequence[Answered]) -> tuple[list[str], list[str]]:
    return [answer.posed.expected for answer in answers], [answer.got for answer in answers]
