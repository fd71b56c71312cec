"""The scorer `judge`: a language model grades answers, behind an OpenAI-compatible endpoint; off unless allowed."""

import re
from collections.abc import Sequence
from typing import Any

from prunetune.errors import ConfigError
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.protocol import BackendError, Response
from prunetune.evaluation.suites.text_scorers import MetricValues, ScorerOptions

PROMPT = """\
Grade an answer.

Question:
{{ prompt }}

{% if expected %}Reference answer:
{{ expected }}

{% endif %}Answer to grade:
{{ got }}

Say how good the answer is on a scale from {{ low }} (useless) to {{ high }} (perfect). Reply with the number only."""

OPTIONS: dict[str, Any] = {
    "url": "",  # http://127.0.0.1:8000/v1
    "model": "",
    "prompt": PROMPT,
    "low": 1.0,
    "high": 5.0,
    "key_env": "",  # the environment variable that holds the key
    "timeout": 60.0,
}
# Every number begins where no digit stands before it, and no repeat gives back what it took (++, *+): so the time is
# linear in the length of a reply, whatever a server sends.
NUMBER_PATTERN = r"(?:(?<!\w)-)?(?<!\d)\d++(?:\.\d++)?"
NUMBER_RE = re.compile(NUMBER_PATTERN)
FRACTION_RE = re.compile(
    rf"({NUMBER_PATTERN})[^\w/]*+(/++|\bout\s++of\b|\bof\b)[^\w/]*+({NUMBER_PATTERN})", re.IGNORECASE
)  # 4/5, 3 out of 5, **4** / 5
_SPAN = rf"{NUMBER_PATTERN}\s*+(?:-|–|—|\bto\b|\band\b)\s*+{NUMBER_PATTERN}"
SCALE = re.compile(
    rf"\b(?:from|between)\s++{_SPAN}|{_SPAN}[\s-]++(?:point\s++)?(?:scale|range)\b"
    rf"|{NUMBER_PATTERN}[\s-]*+point\s++scale\b"
    rf"|\b(?:scale|range)\s*+(?:of|from|is|:)?\s*+\(?(?:{_SPAN}|{NUMBER_PATTERN})",
    re.IGNORECASE,
)  # from 1 to 5, a 1-5 scale, a 5-point scale, on a scale of 1 to 5


def judge_scores(answers: Sequence[Response], options: ScorerOptions) -> MetricValues:
    """The judge's mark of each answer, scaled so that `low` is 0 and `high` is 1."""
    from prunetune.data.templates import compile_template

    low, high = float(options["low"]), float(options["high"])
    if not low < high:
        raise ConfigError(f"judge: low is {low:g} and high {high:g}; the scale has to rise")
    server = EndpointClient(options["url"], key_env=options["key_env"], timeout=options["timeout"])
    template = compile_template(options["prompt"], "judge: prompt")

    def mark(answer: Response) -> float:
        record = answer.prompt.record
        prompt = record.prompt or "\n".join(message.content for message in record.messages)
        known = {"prompt": prompt, "expected": answer.prompt.expected, "got": answer.text, "low": f"{low:g}"}
        text = template({**answer.prompt.fields, **known, "high": f"{high:g}"}, record.source)
        reply = server.chat(options["model"], [{"role": "user", "content": text}], max_tokens=64)
        return (_mark(reply, low, high, record.source or record.id) - low) / (high - low)

    return {"judge": server.map_concurrently(answers, mark)}


def _mark(reply: str, low: float, high: float, item: str) -> float:
    """The one number of the scale in a reply, or in its last line where reasons come first; the scale may be named.

    Raises `BackendError` where there is no such number, or several.
    """
    within = _within(reply, low, high)
    last = _within(reply.strip().rpartition("\n")[2], low, high)
    for marks in (within, last):
        if len(marks) == 1:
            return marks.pop()
    several = f"{len(within)} numbers" if within else "no number"
    shown = repr(" ".join(reply.split())[:80])
    raise BackendError(
        f"judge: {several} from {low:g} to {high:g} in its reply on item {item}: {shown}; "
        "have its prompt ask for one number and nothing else",
        quoted=shown,
    )


def _within(words: str, low: float, high: float) -> set[float]:
    plain = FRACTION_RE.sub(lambda match: _numerator(match, high), SCALE.sub(" ", words))
    return {number for digits in NUMBER_RE.findall(plain) if low <= (number := float(digits)) <= high}


def _numerator(fraction: re.Match[str], high: float) -> str:
    """The mark in "4/5"; a fraction of another scale is no mark, but "2 of 3" may be any text."""
    mark, by, scale = fraction.groups()
    if float(scale) == high:
        return f" {mark} "
    return fraction[0] if by.lower() == "of" else " "
