"""When two texts count as equal, and the words that ROUGE compares, in any script."""

import re
import sys
import unicodedata
from functools import cache

# Scripts without spaces between words: Thai and Lao; Burmese; Khmer; Tai Le and related; kana and Bopomofo; Chinese.
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
    """Words for ROUGE (a tokenizer of rouge_score): its own words of ASCII letters and digits, and words of any other
    script with their accents; in scripts without spaces, every character is a word."""

    def __init__(self, *, stemmer: bool = False) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(stemmer)

    def tokenize(self, text: str) -> list[str]:
        """The words in lower case; English ones are stemmed where that is wanted."""
        words = [text] if text.isascii() else _word().findall(unicodedata.normalize("NFC", text).lower())
        return [token for word in words for token in (self._ascii.tokenize(word) if word.isascii() else [word])]


@cache
def _word() -> re.Pattern[str]:
    # To `re`, accents, vowel signs and tone marks are no part of a word.
    marks = "".join(mark for mark in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(mark)[0] == "M")
    letter, alone = rf"[^\W_{SPACELESS}]", rf"(?=[^\W_])[{SPACELESS}]"
    return re.compile(rf"{letter}(?:{letter}|[{marks}])*|{alone}[{marks}]*")
