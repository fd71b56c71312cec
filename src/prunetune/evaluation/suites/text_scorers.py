"""Scores of written answers: each takes answers and a scorer's options, and gives every item its value by metric."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prunetune.errors import ConfigError
from prunetune.evaluation.corpus_metrics import sentence_bleu, sentence_chrf
from prunetune.evaluation.suites.protocol import Response
from prunetune.evaluation.text_metrics import RougeTokenizer, normalise_text
from prunetune.evaluation.text_metrics import exact_match as equal
from prunetune.utils.optional import import_optional

ScorerOptions = Mapping[str, Any]
MetricValues = dict[str, list[float]]  # metric -> one value an item

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where answer and reference are equal but for case and white space; to the letter where `strict`."""
    if options["strict"]:
        return {"exact_match": [float(each.prompt.expected.strip() == each.text) for each in answers]}
    return {"exact_match": [float(equal(each.prompt.expected, each.text)) for each in answers]}


def label_match(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where a written label is the right one; the task's score is the mean F1 over labels."""
    return {"label_f1": [float(equal(each.prompt.expected, each.text)) for each in answers]}


def contains(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the answer holds the reference, or one of `any`, and all of `all`; case and white space do not count."""
    some, every = list(options["any"]), list(options["all"])

    def holds(answer: Response) -> float:
        got = normalise_text(answer.text)
        wanted = some or ([] if every else [answer.prompt.expected])
        found = not wanted or any(normalise_text(text) in got for text in wanted)
        return float(found and all(normalise_text(text) in got for text in every))

    return {"contains": [holds(answer) for answer in answers]}


def regex(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the pattern is found; where it has a group, what the group holds must equal the reference."""
    pattern = compile_pattern(options)

    def matches(answer: Response) -> float:
        found = pattern.search(answer.text)
        if found is None or not pattern.groups:
            return float(found is not None)
        return float(equal(answer.prompt.expected, found[1] or ""))

    return {"regex": [matches(answer) for answer in answers]}


def compile_pattern(options: ScorerOptions) -> re.Pattern[str]:
    """The compiled pattern; raises `ConfigError`."""
    try:
        return re.compile(options["pattern"], re.IGNORECASE if options["ignore_case"] else 0)
    except re.error as broken:
        raise ConfigError(f"regex: pattern {options['pattern']!r} is not a regular expression ({broken})") from broken


def json_schema(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the answer is JSON and fits the schema (jsonschema)."""
    jsonschema = import_optional("jsonschema", extra="eval", use="scorer json_schema")
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

    return {"json_schema": [fits(answer.text) for answer in answers]}


def token_f1(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """F1 of the words that answer and reference share, without case, punctuation and articles (as for SQuAD 1.1)."""

    def score(expected: str, got: str) -> float:
        wanted, found = squad_words(expected), squad_words(got)
        shared = sum((Counter(wanted) & Counter(found)).values())
        if not wanted or not found:
            return float(wanted == found)
        return 2 * shared / (len(wanted) + len(found))

    return {"token_f1": [score(answer.prompt.expected, answer.text) for answer in answers]}


def squad_words(text: str) -> list[str]:
    """The words that count."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", plain).split()


def rouge(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """ROUGE-1, -2 and -L F1 in 0..1 (rouge_score) over `Words`; 0 where a side has none."""
    rouge_scorer = import_optional("rouge_score.rouge_scorer", extra="eval", use="scorer rouge")
    scorer = rouge_scorer.RougeScorer(list(ROUGE.values()), tokenizer=RougeTokenizer(stemmer=options["stemmer"]))
    found = [scorer.score(answer.prompt.expected, answer.text) for answer in answers]
    return {metric: [float(scores[name].fmeasure) for scores in found] for metric, name in ROUGE.items()}


def bleu(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """Sentence BLEU of each item; the task's score is corpus BLEU, 0..100 (sacrebleu)."""
    return {"bleu": sentence_bleu(*_pairs(answers))}


def chrf(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """Sentence chrF2 of each item; the task's score is that of the corpus, 0..100 (sacrebleu)."""
    return {"chrf": sentence_chrf(*_pairs(answers))}


def _pairs(answers: Sequence[Response]) -> tuple[list[str], list[str]]:
    return [answer.prompt.expected for answer in answers], [answer.text for answer in answers]
