"""The built-in demo data: inclusion terms of ICD-10-CM, each to be classified by chapter.

The package simple-icd-10-cm contains the tabular list of the classification as XML. Splits are made by category (the
three-character code), so search, valid and test have only categories that tuning never sees.
"""

import hashlib
import importlib.util
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

from prunetune.data.records import Record
from prunetune.errors import DataError, MissingPackage

# By chapter number, 1 to 22. Each is one token of the demo's model, so that no label is favoured for its length.
LABELS = (
    " infections", " tumors", " blood", " endocrine", " mental", " nervous", " eye", " ear", " circulatory",
    " respiratory", " digestive", " skin", " musculoskeletal", " urinary", " pregnancy", " newborn", " congenital",
    " symptoms", " injuries", " external", " services", " special",
)  # fmt: skip
SHARES = {"train": 80, "search": 8, "valid": 4, "test": 8}  # percent of categories
SALT = 22  # the first number with which every chapter is in train and test, and the splits have about these shares


@dataclass(frozen=True)
class InclusionTerm:
    """An inclusion term and its place in the classification."""

    text: str
    chapter: int
    category: str  # "A00"


def read_demo(split: str, weight: float = 1.0) -> list[Record]:
    """The records of one split (train, search, valid, test) of the demo, the same in every run.

    Raises `MissingPackage` if simple-icd-10-cm is not installed.
    """
    counts: dict[str, int] = defaultdict(int)
    records = []
    for term in _unambiguous_terms(tabular_list()):
        if split_of_category(term.category) != split:
            continue
        counts[term.category] += 1
        id, answer = f"demo:{term.category}.{counts[term.category]}", term.chapter - 1
        record = Record(
            kind="completion", prompt=f"Diagnosis: {term.text}\nICD-10-CM chapter:", completion=LABELS[answer],
            choices=LABELS, answer=answer, task="icd10_chapter", id=id, group=term.category, source=id, weight=weight,
        )  # fmt: skip
        records.append(record)
    return records


@lru_cache(maxsize=1)
def _unambiguous_terms(path: Path) -> tuple[InclusionTerm, ...]:
    # Cached: a run reads four splits of one file, which takes half a second to parse.
    return drop_ambiguous(read_terms(path))


def tabular_list() -> Path:
    """The XML file of the installed package; the package is not imported, since that takes two seconds."""
    spec = importlib.util.find_spec("simple_icd_10_cm")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("data source 'demo' needs simple-icd-10-cm; run: pip install simple-icd-10-cm")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("data/*.xml"))
    if not files:
        raise DataError("simple-icd-10-cm has no data/*.xml; run: pip install --force-reinstall simple-icd-10-cm")
    return files[-1]


def read_terms(path: Path) -> Iterator[InclusionTerm]:
    """All inclusion terms under a category, in the order of the classification."""
    chapters = ElementTree.parse(path).getroot().iter("chapter")  # noqa: S314 - a file of an installed package
    for chapter in chapters:
        number = int(chapter.findtext("name", "0"))
        for category in chapter.iterfind("section/diag"):
            code = category.findtext("name", "")
            for note in category.iterfind(".//inclusionTerm/note"):
                yield InclusionTerm(" ".join((note.text or "").split()), number, code)


def drop_ambiguous(terms: Iterable[InclusionTerm]) -> tuple[InclusionTerm, ...]:
    """The terms of one chapter, each once: the first of those that differ in case only."""
    by_text: dict[str, list[InclusionTerm]] = defaultdict(list)
    for term in terms:
        by_text[term.text.casefold()].append(term)
    return tuple(same[0] for same in by_text.values() if len({term.chapter for term in same}) == 1)


def split_of_category(category: str) -> str:
    """The split of a category, by its hash: it never changes."""
    point = int(hashlib.sha256(f"demo {SALT} {category}".encode()).hexdigest(), 16) % 100
    return next(name for name, end in zip(SHARES, accumulate(SHARES.values()), strict=True) if point < end)
