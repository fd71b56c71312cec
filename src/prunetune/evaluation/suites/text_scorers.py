"""Scorers of generated answers: each is a function of answers and options that gives every item a value by metric.

A new one is a function here and a line in `SCORERS` (scorers.py); see docs/extend/scorer.md.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prunetune.errors import ConfigError
from prunetune.evaluation.statistics import sentence_scores
from prunetune.evaluation.suites.protocol import Response
from prunetune.evaluation.text_metrics import RougeTokenizer, normalise_text
from prunetune.evaluation.text_metrics import exact_match as is_same_text
from prunetune.utils.optional import import_optional
from prunetune.utils.untrusted import parse_json, short_repr

ScorerOptions = Mapping[str, Any]
MetricValues = dict[str, list[float]]  # metric -> one value an item

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where answer and reference are equal except for case and white space; with `strict`, exactly equal."""
    if options["strict"]:
        return {"exact_match": [float(answer.prompt.expected.strip() == answer.text) for answer in answers]}
    return {"exact_match": [float(is_same_text(answer.prompt.expected, answer.text)) for answer in answers]}


def label_match(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the generated label is the right one; the task's score is the mean F1 over labels."""
    return {"label_f1": [float(is_same_text(answer.prompt.expected, answer.text)) for answer in answers]}


def contains(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the answer has the reference, or one of `any`, and all of `all`; case and white space do not count."""
    alternatives, required = list(options["any"]), list(options["all"])

    def score(answer: Response) -> float:
        got = normalise_text(answer.text)
        wanted = alternatives or ([] if required else [answer.prompt.expected])
        has_one = not wanted or any(normalise_text(text) in got for text in wanted)
        return float(has_one and all(normalise_text(text) in got for text in required))

    return {"contains": [score(answer) for answer in answers]}


def regex(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the pattern matches; if it has a group, the group's text must equal the reference."""
    pattern = compile_pattern(options)

    def score(answer: Response) -> float:
        match = pattern.search(answer.text)
        if match is None or not pattern.groups:
            return float(match is not None)
        return float(is_same_text(answer.prompt.expected, match[1] or ""))

    return {"regex": [score(answer) for answer in answers]}


def compile_pattern(options: ScorerOptions) -> re.Pattern[str]:
    """The compiled pattern; raises `ConfigError`."""
    try:
        return re.compile(options["pattern"], re.IGNORECASE if options["ignore_case"] else 0)
    except (re.error, OverflowError, RecursionError) as broken:
        raise ConfigError(
            f"regex: pattern {short_repr(options['pattern'])} is not a regular expression ({broken})"
        ) from broken


def json_schema(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """1 where the answer is JSON that is valid under the schema (jsonschema)."""
    jsonschema = import_optional("jsonschema", extra="eval", use="scorer json_schema")
    kind = jsonschema.validators.validator_for(options["schema"], default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(options["schema"])
    except jsonschema.SchemaError as broken:
        raise ConfigError(f"json_schema: not a JSON schema: {broken.message}") from broken
    validator = kind(options["schema"])

    def is_valid(text: str) -> float:
        try:
            return float(validator.is_valid(parse_json(text, nan=True)))
        except (ValueError, RecursionError):
            return 0.0

    return {"json_schema": [is_valid(answer.text) for answer in answers]}


def token_f1(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """F1 of the words that answer and reference share, without case, punctuation and articles (as for SQuAD 1.1)."""

    def score(expected: str, got: str) -> float:
        wanted, words = squad_words(expected), squad_words(got)
        shared = sum((Counter(wanted) & Counter(words)).values())
        if not wanted or not words:
            return float(wanted == words)
        return 2 * shared / (len(wanted) + len(words))

    return {"token_f1": [score(answer.prompt.expected, answer.text) for answer in answers]}


def squad_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", plain).split()


def rouge(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """ROUGE-1, -2 and -L F1 in 0..1 (rouge_score) over the words of `RougeTokenizer`; 0 where a side has none."""
    rouge_scorer = import_optional("rouge_score.rouge_scorer", extra="eval", use="scorer rouge")
    scorer = rouge_scorer.RougeScorer(list(ROUGE.values()), tokenizer=RougeTokenizer(stemmer=options["stemmer"]))
    scores = [scorer.score(answer.prompt.expected, answer.text) for answer in answers]
    return {metric: [float(score[name].fmeasure) for score in scores] for metric, name in ROUGE.items()}


def bleu(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """Sentence BLEU of each item; the task's score is corpus BLEU, 0..100 (sacrebleu)."""
    return {"bleu": sentence_scores("BLEU", [(answer.prompt.expected, answer.text) for answer in answers])}


def chrf(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """Sentence chrF2 of each item; the task's score is that of the corpus, 0..100 (sacrebleu)."""
    return {"chrf": sentence_scores("CHRF", [(answer.prompt.expected, answer.text) for answer in answers])}
