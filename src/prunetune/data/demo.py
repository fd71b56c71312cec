"""The embedded data set: inclusion terms of ICD-10-CM, each to be put into its chapter.

The package simple-icd-10-cm carries the tabular list of the classification as XML. Parts are cut by category (the
three-character code), so search, valid and test hold only categories that tuning never sees.
"""

from __future__ import annotations

import hashlib
import importlib.util
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from prunetune.data.records import Record
from prunetune.errors import DataError, MissingPackage

# By chapter number, 1 to 22; each is one token of the demo's model, so no label is favoured for its length.
LABELS = (
    " infections",
    " tumors",
    " blood",
    " endocrine",
    " mental",
    " nervous",
    " eye",
    " ear",
    " circulatory",
    " respiratory",
    " digestive",
    " skin",
    " musculoskeletal",
    " urinary",
    " pregnancy",
    " newborn",
    " congenital",
    " symptoms",
    " injuries",
    " external",
    " services",
    " special",
)
SHARES = {"train": 80, "search": 8, "valid": 4, "test": 8}  # percent of categories
# Of small numbers the first under which every chapter stands in train and test, and the parts have about these shares.
SALT = 22


@dataclass(frozen=True)
class InclusionTerm:
    """An inclusion term where the classification lists it."""

    text: str
    chapter: int
    category: str  # "A00"


def read_demo(split: str, weight: float = 1.0) -> list[Record]:
    """The part of the demo's records that `split` (train, search, valid, test) names; the same in every run.

    Raises `MissingPackage` without simple-icd-10-cm.
    """
    counts: dict[str, int] = defaultdict(int)
    records = []
    for term in _usable(tabular_list()):
        if split_of_category(term.category) == split:
            counts[term.category] += 1
            records.append(_record(term, f"demo:{term.category}.{counts[term.category]}", weight))
    return records


@lru_cache(maxsize=1)
def _usable(path: Path) -> tuple[InclusionTerm, ...]:
    # A run reads four parts of one file, and half a second goes into parsing it.
    return tuple(drop_ambiguous(read_terms(path))[0])


def _record(term: InclusionTerm, id: str, weight: float) -> Record:
    answer = term.chapter - 1
    return Record(
        kind="completion",
        prompt=f"Diagnosis: {term.text}\nICD-10-CM chapter:",
        completion=LABELS[answer],
        choices=LABELS,
        answer=answer,
        task="icd10_chapter",
        id=id,
        group=term.category,
        source=id,
        weight=weight,
    )


def tabular_list() -> Path:
    """The XML file of the installed package, found without the two seconds that importing the package takes."""
    spec = importlib.util.find_spec("simple_icd_10_cm")
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage("data source 'demo' needs simple-icd-10-cm; run: pip install 'prunetune[demo]'")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("data/*.xml"))
    if not found:
        raise DataError("simple-icd-10-cm holds no data/*.xml; run: pip install --force-reinstall simple-icd-10-cm")
    return found[-1]


def read_terms(path: Path) -> Iterator[InclusionTerm]:
    """All inclusion terms under a category, in the order of the classification."""
    chapters = ElementTree.parse(path).getroot().iter("chapter")  # noqa: S314 - a file of an installed package
    for chapter in chapters:
        number = int(chapter.findtext("name", "0"))
        for category in chapter.iterfind("section/diag"):
            code = category.findtext("name", "")
            for note in category.iterfind(".//inclusionTerm/note"):
                yield InclusionTerm(" ".join((note.text or "").split()), number, code)


def drop_ambiguous(terms: Iterator[InclusionTerm]) -> tuple[list[InclusionTerm], int, int]:
    """Terms with one right answer, each once; then how many were dropped for two chapters, and how many as repeats."""
    listed: dict[str, list[InclusionTerm]] = defaultdict(list)
    for term in terms:
        listed[term.text.casefold()].append(term)
    kept = [same[0] for same in listed.values() if len({term.chapter for term in same}) == 1]
    all_terms = sum(map(len, listed.values()))
    dropped = sum(len(same) for same in listed.values() if len({term.chapter for term in same}) > 1)
    return kept, dropped, all_terms - dropped - len(kept)


def split_of_category(category: str) -> str:
    """The split that a category belongs to: by its hash, so it never moves."""
    point = int(hashlib.sha256(f"demo {SALT} {category}".encode()).hexdigest(), 16) % 100
    for name, share in SHARES.items():
        if point < share:
            return name
        point -= share
    raise AssertionError("the shares make 100")
