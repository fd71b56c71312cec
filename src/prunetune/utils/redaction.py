"""The one place that decides what is shown of rows: all, all but what patterns match, or nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prunetune.errors import HIDDEN, ConfigError, PrunetuneError
from prunetune.utils.failures import first_line
from prunetune.utils.untrusted import short_repr

REDACTED = "[redacted]"  # in place of a match
MATCH_SECONDS = 1.0  # for a pattern on one text; a text that takes longer is replaced as a whole
MAX_PATTERN_CHARS = 1000


@dataclass(frozen=True)
class Redaction:
    """What a file, a page or a log line may hold of prompts, answers, row ids and what a model generates from them."""

    samples: bool = True
    patterns: tuple[str, ...] = ()

    def text(self, text: str) -> str:
        """What is shown of a text of a row, or of a model's answer to it."""
        import regex

        if not self.samples:
            return text and HIDDEN
        for pattern in self.patterns:
            try:
                text = regex.sub(pattern, REDACTED, text, timeout=MATCH_SECONDS)
            except TimeoutError:
                return REDACTED
        return text

    def message(self, error: BaseException) -> str:
        """What is shown of an error; of one that is no `PrunetuneError`, its type and first line."""
        if isinstance(error, PrunetuneError):
            if self.samples:
                return self.text(str(error))
            note = "; samples off hides what it quotes" if error.unquoted != error.args[0] else ""
            return f"{type(error)(error.unquoted)}{note}"  # in one line, as errors are
        name = type(error).__name__
        return self.text(f"{name}: {first_line(error)}") if self.samples else name

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Let errors of the block say only what may be shown."""
        try:
            yield
        except PrunetuneError as error:
            if (shown := self.message(error)) == str(error):
                raise
            raise type(error)(shown) from None


SHOW_ALL = Redaction()


def parse_pattern(value: Any, name: str) -> str:
    """A regular expression that matches some text and not the empty one; raises `ConfigError`."""
    import regex

    try:
        if not isinstance(value, str) or len(value) > MAX_PATTERN_CHARS:
            raise ValueError(f"it is no text of {MAX_PATTERN_CHARS:,} characters at most")
        if regex.search(value, "", timeout=MATCH_SECONDS):
            raise ValueError("it matches the empty text")
    except (regex.error, ValueError, OverflowError, RecursionError, TimeoutError) as broken:
        raise ConfigError(
            f"{name}: {short_repr(value)} is no regular expression that can be used ({broken}); correct it"
        ) from broken
    return value
