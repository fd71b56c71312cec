"""Laws of splits: disjoint by question and group, carved by seed alone, and refused where rows overlap."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from prunetune.config.recipe import DataConfig
from prunetune.data import splits
from prunetune.data.records import Record
from prunetune.data.splits import Splits, load_splits
from prunetune.errors import DataError
from prunetune.utils.redaction import Redaction
from support.data import pairs, write_lines


def loaded(
    folder: Path, seed: int = 0, *, options: dict[str, Any] | None = None, **rows: list[dict[str, Any]]
) -> Splits:
    """Splits of these rows: the rows of each split are written to a file of its own."""
    sources = {
        "distill_texts" if name == "texts" else name: (write_lines(folder / name / f"{name}.jsonl", *split_rows),)
        for name, split_rows in rows.items()
    }
    return load_splits(DataConfig(**sources, **(options or {})), seed)


def prompts(records: tuple[Record, ...]) -> set[str]:
    return {record.prompt for record in records}


def test_carved_splits_are_disjoint_and_have_every_row(tmp_path: Path) -> None:
    splits = loaded(tmp_path, train=pairs(200))
    by_name = splits.by_name()
    assert {name: len(records) for name, records in by_name.items()} == {
        "train": 150, "search": 20, "valid": 10, "test": 20,
    }  # fmt: skip
    assert set().union(*map(prompts, by_name.values())) == {row["prompt"] for row in pairs(200)}
    assert splits.dropped == 0


def test_carving_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = pairs(100)
    first = loaded(tmp_path / "a", train=rows)
    random.Random(1).shuffle(rows)
    again, other = loaded(tmp_path / "b", train=rows), loaded(tmp_path / "c", seed=1, train=rows)
    for name, records in first.by_name().items():
        assert prompts(records) == prompts(again.by_name()[name])
    assert prompts(first.test) != prompts(other.test)


def test_equal_questions_are_in_one_split(tmp_path: Path) -> None:
    rows = [row | {"completion": answer} for row in pairs(40) for answer in ("a", "b", "c")]
    splits = loaded(tmp_path, train=rows).by_name()
    for first, second in combinations(splits.values(), 2):
        assert not prompts(first) & prompts(second)


LIKE: dict[str, Any] = {"prompt": "Is it so?"}
FORMS: dict[str, dict[str, Any]] = {
    "prompt": LIKE | {"completion": "yes"},
    "choices": LIKE | {"choices": ["yes", "no"], "answer": 0},
    "other choices": LIKE | {"choices": ["perhaps", "no"], "answer": 0},
    "chat": {"messages": [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "yes"}]},
    "text": {"text": "is it so?"},
}


@pytest.mark.parametrize(("first", "second"), [*combinations(FORMS, 2)])
def test_question_hash_is_equal_in_every_form_but_for_two_lists_of_choices(
    first: str, second: str, tmp_path: Path
) -> None:
    for loser, keeper in ((first, second), (second, first)):
        rows = {"train": [*pairs(20), FORMS[loser]], "test": [*pairs(2, 40), FORMS[keeper]]}
        splits = loaded(tmp_path / loser, options={"overlap": "drop"}, **rows)
        assert splits.dropped == ({first, second} != {"choices", "other choices"})


@pytest.mark.parametrize("seed", range(4))
def test_forms_of_a_question_are_carved_together(seed: int, tmp_path: Path) -> None:
    def forms(number: int) -> list[dict[str, Any]]:
        question = f"Is case {number} so?"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
        listed = [{"prompt": question, "choices": ["yes", other], "answer": 0} for other in ("no", "perhaps")]
        return [*listed, {"prompt": question, "completion": "yes"}, {"messages": messages}]

    parts = loaded(tmp_path, seed, train=[row for number in range(30) for row in forms(number)]).by_name()
    hashes = [{record.question_hash(with_choices=False) for record in records} for records in parts.values()]
    assert sum(map(len, hashes)) == 30 == len(set().union(*hashes))


def turns(*messages: str) -> dict[str, Any]:
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, messages, strict=False)]}


def test_chat_shares_no_split_with_the_question_of_an_earlier_turn(tmp_path: Path) -> None:
    chat, other = turns("question 3", "a", "Sure?", "yes"), turns("question 99", "a", "Sure?", "yes")
    for number in range(5):
        split = loaded(tmp_path, number, train=[*pairs(9), chat, other])
        of_row = {record.source: name for name, records in split.by_name().items() for record in records}
        places = {source.rpartition(":")[2]: name for source, name in of_row.items()}
        assert places["10"] == places["4"]
    given = {"search": pairs(2, 30), "valid": pairs(2, 40), "test": pairs(9)}
    with pytest.raises(DataError, match=r"data\.train and data\.test overlap: 1 of 2 rows"):
        loaded(tmp_path, train=[chat, other], **given)
    chat["messages"][1]["weight"] = 0
    assert len(loaded(tmp_path, train=[chat, other], **given).train) == 2


# Where rows 1 to 24 went under seed 3, in version 0.1: a new version must not reshuffle data of one form.
CARVED = {
    "prompts": (pairs(24), [6, 8, 23, 3, 21]),
    "choices": (
        [{"prompt": f"question {n // 2}", "choices": ["a", f"b{n}"], "answer": 0} for n in range(24)],
        [21, 22, 2, 3, 5],
    ),
    "texts": ([{"text": f"text {n}"} for n in range(24)], [18, 22, 19, 3, 21]),
    "chats": ([turns(f"question {n}", "a") for n in range(24)], [14, 23, 7, 13, 22]),
    "long chats": ([turns("hi", "hello", f"question {n}", "a") for n in range(24)], [5, 15, 7, 11, 14]),
    "groups": ([row | {"doc": f"d{n // 2}"} for n, row in enumerate(pairs(24))], [5, 6, 21, 22, 3, 4]),
    "chats in groups": (
        [turns(f"question {n}", "a") | {"doc": f"d{n // 2}"} for n in range(24)],
        [23, 24, 21, 22, 13, 14],
    ),
}


@pytest.mark.parametrize("form", CARVED)
def test_rows_of_one_form_keep_their_carved_split(form: str, tmp_path: Path) -> None:
    rows, expected = CARVED[form]
    splits = loaded(tmp_path, 3, options={"group": "doc"} if "group" in form else {}, train=rows)
    carved = splits.search + splits.valid + splits.test
    assert [int(record.source.rpartition(":")[2]) for record in carved] == expected


def test_groups_and_questions_that_link_them_stay_together(tmp_path: Path) -> None:
    rows = [row | {"doc": f"d{index // 4}"} for index, row in enumerate(pairs(120))]
    rows += [{"prompt": f"Shared {n}", "completion": "x", "doc": f"d{doc}"} for n in range(5) for doc in (n, 29 - n)]
    parts = loaded(tmp_path, options={"group": "doc"}, train=rows).by_name()
    homes = defaultdict(set)
    for name, records in parts.items():
        assert records
        for record in records:
            homes[record.group].add(name)
            homes[record.question_hash()].add(name)
    assert all(len(home) == 1 for home in homes.values())


def test_split_takes_one_group_even_if_all_are_large(tmp_path: Path) -> None:
    rows = [row | {"doc": f"d{index % 4}"} for index, row in enumerate(pairs(40))]
    parts = loaded(tmp_path, options={"group": "doc"}, train=rows).by_name()
    assert [len(records) for records in parts.values()] == [10, 10, 10, 10]


@pytest.mark.parametrize(("rows", "given"), [(3, {}), (1, {"valid": pairs(1, 90), "test": pairs(1, 91)})])
def test_too_few_rows_to_carve_error_names_the_number_needed(rows: int, given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"has {rows} different rows, too few .* {rows + 1} are needed"):
        loaded(tmp_path, train=pairs(rows), **given)


def test_four_rows_are_enough(tmp_path: Path) -> None:
    assert [len(records) for records in loaded(tmp_path, train=pairs(4)).by_name().values()] == [1, 1, 1, 1]


def test_given_splits_are_unchanged(tmp_path: Path) -> None:
    splits = loaded(tmp_path, train=pairs(10), search=pairs(2, 20), valid=pairs(3, 30), test=pairs(4, 40))
    assert [len(records) for records in splits.by_name().values()] == [10, 2, 3, 4]


CLASHES = [("train", "test"), ("train", "valid"), ("train", "search"), ("search", "test"), ("search", "valid")]


@pytest.mark.parametrize(("loser", "keeper"), [*CLASHES, ("valid", "test")])
def test_overlap_is_refused_or_dropped_from_the_training_side(loser: str, keeper: str, tmp_path: Path) -> None:
    rows = {"train": pairs(9), "search": pairs(9, 20), "valid": pairs(9, 40), "test": pairs(9, 60)}
    rows[loser] += [{"prompt": rows[keeper][4]["prompt"].upper() + " ", "completion": "other"}] * 2
    with pytest.raises(DataError) as refused:
        loaded(tmp_path, **rows)
    message = str(refused.value)
    assert f"{loser}.jsonl:10 with the same question as {tmp_path / keeper / keeper}.jsonl:5" in message
    assert f"2 of 11 rows of {loser}" in message
    assert "data.overlap=drop" in message
    splits = loaded(tmp_path, options={"overlap": "drop"}, **rows)
    assert [len(records) for records in splits.by_name().values()] == [9, 9, 9, 9]
    assert splits.dropped == 2


@pytest.mark.parametrize("keeper", ["valid", "test"])
def test_texts_in_a_scored_split_are_refused_or_dropped(keeper: str, tmp_path: Path) -> None:
    rows = {"train": pairs(40), "valid": pairs(4, 60), "test": pairs(4, 80)}
    texts = [{"text": "A text."}, rows[keeper][0]]
    with pytest.raises(DataError, match=f"texts.jsonl:2 with the same question as .*{keeper}.jsonl:1"):
        loaded(tmp_path, texts=texts, **rows)
    splits = loaded(tmp_path, options={"overlap": "drop"}, texts=texts, **rows)
    assert [record.completion for record in splits.texts] == ["A text."]
    assert set(splits.hashes) == {"train", "search", "valid", "test", "texts"}


@pytest.mark.parametrize("seed", range(8))
def test_texts_and_guard_share_nothing_with_carved_splits(seed: int, tmp_path: Path) -> None:
    rows = [row | {"doc": f"d{index // 2}"} for index, row in enumerate(pairs(80))]
    texts = [*pairs(10), *({"text": f"A note of document {n}.", "doc": f"d{n}"} for n in range(40)), {"text": "Free."}]
    guard = [{"text": "Guarded.", "doc": "g"}, rows[30], {"text": "Another.", "doc": "d20"}]
    splits = loaded(tmp_path, seed, options={"group": "doc", "overlap": "drop"}, train=rows, texts=texts, guard=guard)
    scored = splits.test + splits.valid + splits.search
    for extra in (splits.texts, splits.guard):
        assert not {record.question_hash() for record in scored} & {record.question_hash() for record in extra}
        assert not {record.group for record in scored} & {record.group for record in extra}
    assert {record.group for record in splits.texts} - {""} == {record.group for record in splits.train}
    remaining = sum(map(len, splits.by_name().values()))
    assert splits.dropped == len(rows) + len(texts) + len(guard) - remaining > 0


def test_texts_that_are_all_dropped_are_refused(tmp_path: Path) -> None:
    without_texts = loaded(tmp_path / "a", train=pairs(40))
    texts = [{"text": record.prompt} for record in without_texts.test]
    with pytest.raises(
        DataError, match=r"data\.distill_texts keeps no row: all 4 share .* name more texts, or sources for"
    ):
        loaded(tmp_path / "b", train=pairs(40), texts=texts)


def test_group_in_two_given_splits_is_overlap(tmp_path: Path) -> None:
    rows = {"train": pairs(20, doc="a") + pairs(20, 20, doc="b")}
    rows |= {"test": pairs(1, 90, doc="a"), "valid": pairs(1, 91, doc="c")}
    with pytest.raises(DataError, match=r"20 of 40 rows of train, first .* with group 'a' as"):
        loaded(tmp_path, options={"group": "doc"}, **rows)
    rows["train"] += pairs(1, 50, doc="e")
    splits = loaded(tmp_path, options={"group": "doc", "overlap": "drop"}, **rows)
    assert splits.dropped == 20
    assert {record.group for record in splits.train + splits.search} == {"b", "e"}


def test_texts_and_guard_may_lack_the_group_but_must_not_share_one(tmp_path: Path) -> None:
    rows = {"train": [row | {"doc": f"d{index // 4}"} for index, row in enumerate(pairs(80))]}
    general = [{"text": "What a general corpus says."}]
    splits = loaded(tmp_path, options={"group": "doc"}, texts=general, guard=[{"text": "Another one."}], **rows)
    assert (len(splits.texts), len(splits.guard)) == (1, 1)
    with pytest.raises(DataError, match=r"data\.train and data\.guard overlap.* with group 'd1' as"):
        loaded(tmp_path, options={"group": "doc"}, guard=[{"text": "Another one.", "doc": "d1"}], **rows)
    with pytest.raises(DataError, match="row has no doc"):
        loaded(tmp_path, options={"group": "doc"}, test=pairs(1, 200), **rows)


def test_general_rows_are_a_split_beside_test_that_train_shares_nothing_with(tmp_path: Path) -> None:
    rows = {"train": pairs(9), "search": pairs(1, 20), "valid": pairs(1, 30), "test": pairs(2, 40)}
    splits = loaded(tmp_path, general=pairs(3, 50), **rows)
    assert (len(splits.test), len(splits.general)) == (2, 3)
    assert set(splits.hashes) == {"train", "search", "valid", "test", "general"}
    with pytest.raises(DataError, match=r"data\.train and data\.general overlap"):
        loaded(tmp_path, general=pairs(3, 7), **rows)


def test_rows_are_dropped_before_splits_are_carved(tmp_path: Path) -> None:
    splits = loaded(tmp_path, options={"overlap": "drop"}, train=pairs(100), test=pairs(50))
    assert splits.dropped == 50
    assert not prompts(splits.test) & prompts(splits.train + splits.search + splits.valid)


def test_split_that_is_all_dropped_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train keeps no row"):
        loaded(tmp_path, options={"overlap": "drop"}, train=pairs(5), test=pairs(5))


def test_no_train_source_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train names no source"):
        load_splits(DataConfig(), 0)


def test_hashes_follow_content_and_order_but_not_place_or_weight(tmp_path: Path) -> None:
    rows = {"search": pairs(2, 20), "valid": pairs(2, 30), "test": pairs(2, 40)}
    first = loaded(tmp_path / "a", train=pairs(5), **rows).hashes
    assert first == loaded(tmp_path / "b", train=pairs(5), **rows).hashes
    assert set(first) == {"train", "search", "valid", "test"}
    for changed in (pairs(5)[::-1], pairs(6), pairs(4), [*pairs(4), {"prompt": "question 4", "completion": "else"}]):
        other = loaded(tmp_path / "c", train=changed, **rows).hashes
        assert other["train"] != first["train"]
        assert other["test"] == first["test"]


PAIRS = [
    ("texts", "test"), ("texts", "valid"), ("texts", "guard"), ("texts", "general"),
    ("guard", "test"), ("guard", "general"), ("valid", "general"),
    ("train", "guard"), ("train", "general"), ("search", "guard"), ("search", "general"),
]  # fmt: skip


@pytest.mark.parametrize(("loser", "keeper"), PAIRS)
def test_splits_beside_the_four_are_disjoint_from_what_they_stand_for(loser: str, keeper: str, tmp_path: Path) -> None:
    names = ("train", "search", "valid", "test", "texts", "guard", "general")
    rows = {name: pairs(3, 10 * index) for index, name in enumerate(names)}
    rows[loser] = [*rows[loser], rows[keeper][1]]
    with pytest.raises(DataError, match=rf"{loser}\.jsonl:4 with the same question as .*{keeper}\.jsonl:2"):
        loaded(tmp_path, **rows)
    splits = loaded(tmp_path, options={"overlap": "drop"}, **rows)
    assert [len(records) for records in splits.by_name().values()] == [3] * 7
    assert splits.dropped == 1


@pytest.mark.parametrize("seed", range(4))
def test_share_of_a_carved_split_is_of_rows_whatever_the_size_of_groups(seed: int, tmp_path: Path) -> None:
    """Six groups of ten rows and forty of one, so that every share can be met exactly."""
    rows = [row | {"doc": f"d{index // 10 if index < 60 else index}"} for index, row in enumerate(pairs(100))]
    shares = {"test_share": 0.2, "valid_share": 0.05, "search_share": 0.1}
    splits = loaded(tmp_path, seed, options={"group": "doc", **shares}, train=rows)
    assert [len(split) for split in (splits.test, splits.valid, splits.search, splits.train)] == [20, 5, 10, 65]


def test_smallest_group_is_carved_where_none_fits_the_share(tmp_path: Path) -> None:
    sizes = {"a": 30, "b": 12, "c": 20, "d": 25}
    rows = [{"prompt": f"{doc} {n}", "completion": "x", "doc": doc} for doc, size in sizes.items() for n in range(size)]
    shares = {"test_share": 0.05, "valid_share": 0.06, "search_share": 0.07}
    splits = loaded(tmp_path, options={"group": "doc", **shares}, train=rows)
    assert [len(split) for split in (splits.test, splits.valid, splits.search, splits.train)] == [12, 20, 25, 30]


def test_demo_gives_every_split_only_if_nothing_else_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def rows(sources: Any, config: DataConfig, split: str, redaction: Redaction) -> tuple[Record, ...]:
        read.append(split)
        return tuple(Record(kind="text", completion=f"{split} {n}", task="t", id=f"{split}{n}") for n in range(9))

    monkeypatch.setattr(splits, "read_records", rows)
    for train, expected in ((("demo",), ["train", "search", "valid", "test"]), (("demo", "x.jsonl"), ["train"])):
        read.clear()
        load_splits(DataConfig(train=train), 0)
        assert read == expected


def test_splits_that_nothing_is_said_of_lost_no_row() -> None:
    assert Splits(train=(), search=(), valid=(), test=()).dropped == 0
