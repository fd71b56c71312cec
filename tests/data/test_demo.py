"""The built-in demo data: terms of ICD-10-CM, in splits that share no category."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import pytest

from prunetune.config.recipe import DataConfig
from prunetune.data import demo
from prunetune.data.demo import LABELS, SHARES, InclusionTerm, drop_ambiguous, read_demo, read_terms, tabular_list
from prunetune.data.sources import SplitName, read_records
from prunetune.data.splits import load_splits
from prunetune.errors import MissingPackage

XML = """<ICD10CM.tabular><chapter><name>1</name><inclusionTerm><note>of the chapter</note></inclusionTerm>
<section id="A"><diag><name>A00</name><inclusionTerm><note>Flu</note><note>Both</note></inclusionTerm>
<diag><name>A00.1</name><inclusionTerm><note>Deep
  term</note></inclusionTerm></diag></diag><diag><name>A01</name><inclusionTerm><note>flu</note></inclusionTerm></diag>
</section></chapter><chapter><name>2</name><section id="B"><diag><name>B00</name>
<inclusionTerm><note>BOTH</note></inclusionTerm></diag></section></chapter></ICD10CM.tabular>"""


def test_terms_are_read_with_chapter_and_category(tmp_path: Path) -> None:
    (tmp_path / "list.xml").write_text(XML, encoding="utf-8")
    terms = list(read_terms(tmp_path / "list.xml"))
    assert terms == [
        InclusionTerm("Flu", 1, "A00"),
        InclusionTerm("Both", 1, "A00"),
        InclusionTerm("Deep term", 1, "A00"),
        InclusionTerm("flu", 1, "A01"),
        InclusionTerm("BOTH", 2, "B00"),
    ]
    assert drop_ambiguous(terms) == (InclusionTerm("Flu", 1, "A00"), InclusionTerm("Deep term", 1, "A00"))


def test_demo_package_has_all_terms() -> None:
    pytest.importorskip("simple_icd_10_cm")
    terms = list(read_terms(tabular_list()))
    kept = drop_ambiguous(terms)
    assert len(terms) == 12_569
    assert len(terms) - 100 < len(kept) <= len(terms)
    assert {term.chapter for term in kept} == set(range(1, 23))


def test_demo_splits_share_no_category_and_no_term() -> None:
    pytest.importorskip("simple_icd_10_cm")
    parts = {name: read_demo(name) for name in SHARES}
    for first, second in combinations(parts.values(), 2):
        assert not {r.group for r in first} & {r.group for r in second}
        assert not {r.question_hash() for r in first} & {r.question_hash() for r in second}
    total = sum(map(len, parts.values()))
    assert len(parts["test"]) >= 400
    for name, share in SHARES.items():
        assert len(parts[name]) / total == pytest.approx(share / 100, rel=0.3)
    assert len({r.answer for r in parts["train"]}) == len({r.answer for r in parts["test"]}) == len(LABELS)
    assert len({r.id for split in parts.values() for r in split}) == total


def test_labels_are_distinct_words_after_a_space() -> None:
    assert len(set(LABELS)) == 22
    assert all(label.startswith(" ") and label.strip().isalpha() for label in LABELS)


@pytest.mark.parametrize("split", ["train", "search", "valid", "test"])
def test_source_demo_gives_the_records_of_the_split(split: SplitName) -> None:
    pytest.importorskip("simple_icd_10_cm")
    records = read_records(["demo*2"], DataConfig(), split)
    assert [r.id for r in records] == [r.id for r in read_demo(split)]
    assert {r.weight for r in records} == {2.0}
    for record in records[:50]:
        assert record.prompt.startswith("Diagnosis: ")
        assert record.prompt.endswith("\nICD-10-CM chapter:")
        assert record.completion == record.choices[record.answer or 0]


def test_demo_alone_has_all_four_splits() -> None:
    pytest.importorskip("simple_icd_10_cm")
    splits = load_splits(DataConfig(train=("demo",)), seed=0)
    assert {name: len(records) for name, records in splits.by_name().items()} == {n: len(read_demo(n)) for n in SHARES}
    assert splits.dropped == 0
    assert splits.hashes == load_splits(DataConfig(train=("demo",)), seed=9).hashes


def test_missing_package_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(MissingPackage, match="pip install simple-icd-10-cm"):
        demo.tabular_list()
