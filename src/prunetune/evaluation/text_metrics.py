"""How near one text is to another, and what makes two equal."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Sequence
from functools import cache

# Thai and Lao; Burmese; Khmer; Tai Le and its like; kana and Bopomofo; Chinese characters: a space ends no word there.
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf"
    "\u3005-\u3007\u3021-\u3029\u3031-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)


def normalise_text(text: str) -> str:
    """Case folded, white space collapsed."""
    return " ".join(text.casefold().split())


def exact_match(expected: str, got: str) -> bool:
    """Equal but for case and white space."""
    return normalise_text(expected) == normalise_text(got)


class RougeTokenizer:
    """What ROUGE compares (a tokenizer of rouge_score): rouge_score's own words of ASCII letters and digits, and beside
    them words of any script with their accents; of scripts without spaces, every character."""

    def __init__(self, *, stemmer: bool = False) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(stemmer)

    def tokenize(self, text: str) -> list[str]:
        """The words in lower case; English ones are stemmed where that is wanted."""
        words = [text] if text.isascii() else _word().findall(unicodedata.normalize("NFC", text).lower())
        return [each for word in words for each in (self._ascii.tokenize(word) if word.isascii() else [word])]


@cache
def _word() -> re.Pattern[str]:
    # `re` takes accents, vowel signs and tone marks for no part of a word.
    marks = "".join(mark for mark in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(mark)[0] == "M")
    letter, alone = rf"[^\W_{SPACELESS}]", rf"(?=[^\W_])[{SPACELESS}]"
    return re.compile(rf"{letter}(?:{letter}|[{marks}])*|{alone}[{marks}]*")


def rouge_l(expected: Sequence[str], got: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each pair in 0..1 (rouge_score, no stemmer) over `Words`; 0 where a side has none."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=RougeTokenizer())
    return [float(scorer.score(want, have)["rougeL"].fmeasure) for want, have in zip(expected, got, strict=True)]
