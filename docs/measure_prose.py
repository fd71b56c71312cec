"""Measure the sentences of user pages; `tests/test_prose.py` holds every page to the bounds.

    python docs/measure_prose.py [PAGE ...]

prints the measures of the pages, and the longest sentences of those that break a bound.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = {"options.md"}
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if not {"research", "reference"} & set(page.relative_to(ROOT).parts) and page.name not in GENERATED
    ),
]
BAR = re.compile(r"(?<![\w-])[A-HL-NQS-UW]\d\d?\b(?!-)")  # ids of acceptance criteria: M1, T2, ...
NAMES = {"F1", "F16", "F32", "L2"}  # metrics and types of numbers


@dataclass(frozen=True)
class Prose:
    """Sentences of a page outside of code, tables and headings, and its other measures."""

    sentences: list[str]
    words: int
    semicolons: int
    bars: list[str]

    def lengths(self) -> list[int]:
        """Words of each sentence, sorted."""
        return sorted(len(sentence.split()) for sentence in self.sentences)

    def quantile(self, share: float) -> int:
        """Words of the sentence that `share` of all sentences do not exceed; 0 of a page with fewer than five."""
        lengths = self.lengths()
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))] if len(lengths) >= 5 else 0

    def broken(self) -> list[str]:
        """The bounds that the page breaks, in words."""
        found = {
            f"median sentence {self.quantile(0.5)} words, 17 are allowed": self.quantile(0.5) > 17,
            f"p90 of sentences {self.quantile(0.9)} words, 30 are allowed": self.quantile(0.9) > 30,
            f"{self.semicolons} semicolons in {self.words} words, .3 in 100 are allowed": self.semicolons
            > max(1, 0.003 * self.words),
            f"ids of acceptance criteria: {', '.join(self.bars)}": bool(self.bars),
        }
        return [line for line, breaks in found.items() if breaks]


def measure(text: str) -> Prose:
    """The prose of a page in Markdown. A link counts as its text, code as one word; items of a list are sentences."""
    text = re.sub(r"^---\n.*?^---\n|<!--.*?-->|^```.*?^```|^~~~.*?^~~~", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n)\n(?:(?: {4}|\t).*\n)+", "\n", re.sub(r"<[^>]+>", "", text))  # indented code, tags
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`\n]+`", "CODE", text))
    lines = text.splitlines()
    prose = [line for line in lines if not re.match(r"\s*\||#|!!!", line)]
    table = " ".join(line for line in lines if line.lstrip().startswith("|"))
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", "\n".join(prose))
    sentences = []
    for block in blocks:
        flat = re.sub(r"^\s*(?:[-*]|\d+\.)\s+|\*{1,2}", "", " ".join(block.split()))
        parts = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!al\.)(?<!vs\.)\s+(?=[A-Z`\"(])", flat)
        sentences += [part for part in parts if len(part.split()) > 2 and " · " not in part]
    words = len(" ".join(sentences).split()) + len(table.replace("|", " ").split())
    bars = sorted({found for found in BAR.findall(" ".join(sentences) + table) if found not in NAMES})
    return Prose(sentences, words, (" ".join(prose) + table).count(";"), bars)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or PAGES):
        prose = measure(path.read_text(encoding="utf-8"))
        print(f"{path}: median {prose.quantile(0.5)}, p90 {prose.quantile(0.9)}, {prose.words} words", prose.semicolons)
        for line in prose.broken():
            print(f"  {line}")
        if prose.broken():
            for sentence in sorted(prose.sentences, key=lambda one: -len(one.split()))[:8]:
                print(f"    {len(sentence.split())}: {sentence}")
