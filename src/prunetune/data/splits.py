"""Train, search, valid and test: disjoint by construction where carved, checked where given."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record
from prunetune.data.sources import Source, SplitName, read_records
from prunetune.errors import DataError

CARVED: tuple[SplitName, ...] = ("test", "valid", "search")  # in this order: the scores come first

# What stands in both is refused, or dropped from the first.
DISJOINT: tuple[tuple[SplitName, SplitName], ...] = (
    ("valid", "test"),
    ("search", "test"),
    ("search", "valid"),
    ("train", "test"),
    ("train", "valid"),
    ("train", "search"),
    ("texts", "test"),
    ("texts", "valid"),
    ("guard", "test"),  # a gate chooses by the guard, so nothing of it is reported
    ("train", "guard"),
    ("search", "guard"),
    ("texts", "guard"),
)


@dataclass(frozen=True)
class Splits:
    """The records of a run; no two splits share a question or a group."""

    train: tuple[Record, ...]
    search: tuple[Record, ...]
    valid: tuple[Record, ...]
    test: tuple[Record, ...]
    texts: tuple[Record, ...] = ()  # beside train and search, for a teacher
    guard: tuple[Record, ...] = ()  # watched during the run
    dropped: int = 0  # records left out because another split holds them too

    def by_name(self) -> dict[SplitName, tuple[Record, ...]]:
        """The records by the name of their split; texts and guard only where there are any."""
        parts: dict[SplitName, tuple[Record, ...]]
        parts = {"train": self.train, "search": self.search, "valid": self.valid, "test": self.test}
        beside: dict[SplitName, tuple[Record, ...]] = {"texts": self.texts, "guard": self.guard}
        return parts | {name: records for name, records in beside.items() if records}

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each split's contents, in order."""
        return {name: _digest(record.content_json() for record in records) for name, records in self.by_name().items()}


def load_splits(config: DataConfig, seed: int) -> Splits:
    """Read what is given and carve the rest off train, by group; the same for one seed, whatever the order of rows.

    Raises `DataError` for data that cannot be used, for splits that overlap, and where train is too small to carve.
    """
    if not config.train:
        raise DataError("data.train names no source; name a file, a glob, a hub data set as owner/name, or demo")
    sources = _configured_sources(config)
    parts = {name: read_records(sources[name], config, name) for name in sources}
    parts, dropped = _make_disjoint(parts, drop=config.overlap == "drop")
    shares = {"search": config.search_share, "valid": config.valid_share, "test": config.test_share}
    wanted = {name: shares[name] for name in CARVED if name not in parts}
    parts |= carve_splits(parts["train"], wanted, seed)
    if "texts" in parts:
        before = len(parts["texts"])
        parts["texts"] = _drop_carved_overlap(parts["texts"], [parts[name] for name in wanted])
        dropped += before - len(parts["texts"])
    return Splits(**parts, dropped=dropped)


def _drop_carved_overlap(texts: Sequence[Record], carved: Iterable[Sequence[Record]]) -> tuple[Record, ...]:
    """The texts that share neither a question nor a group with what was carved off train; train itself they may repeat.

    The guard needs no such care: train was held clear of it before anything was carved off.
    """
    held = {mark for part in carved for record in part for mark in _identity_keys(record)}
    clear = tuple(record for record in texts if held.isdisjoint(_conflict_keys(record)))
    if not clear:
        raise DataError(
            f"data.distill_texts keeps no row: all {len(texts)} share a question or group with what is carved off data.train; "
            "name more texts, or sources for data.test, data.valid and data.search"
        )
    return clear


def _configured_sources(config: DataConfig) -> dict[SplitName, Sequence[str]]:
    given: dict[SplitName, Sequence[str]] = {
        "train": config.train,
        "search": config.search,
        "valid": config.valid,
        "test": config.test,
    }
    # The demo has splits of its own, cut so that no category straddles them.
    if all(Source.parse(source).path == "demo" for source in config.train):
        given = {name: sources or ("demo",) for name, sources in given.items()}
    return {
        name: sources
        for name, sources in {**given, "texts": config.distill_texts, "guard": config.guard}.items()
        if sources
    }


def _make_disjoint(
    parts: Mapping[SplitName, tuple[Record, ...]], *, drop: bool
) -> tuple[dict[SplitName, tuple[Record, ...]], int]:
    result, dropped = dict(parts), 0
    everything = [record for records in parts.values() for record in records]
    marks, meets = ({id(record): of(record) for record in everything} for of in (_identity_keys, _conflict_keys))
    for loser, keeper in DISJOINT:
        if loser not in result or keeper not in result:
            continue
        held = {mark: record for record in result[keeper] for mark in marks[id(record)]}
        clashes = [(record, mark) for record in result[loser] for mark in meets[id(record)] if mark in held]
        shared = {id(record) for record, _ in clashes}
        if shared and not drop:
            record, mark = clashes[0]
            what = f"group {record.group!r}" if mark.startswith("group ") else "the same question"
            raise DataError(
                f"data.{loser} and data.{keeper} overlap: {len(shared)} of {len(result[loser])} rows of {loser}, "
                f"first {record.source} with {what} as {held[mark].source}; "
                f"set data.overlap=drop to leave them out of {loser}, or correct the files"
            )
        result[loser] = tuple(record for record in result[loser] if id(record) not in shared)
        dropped += len(shared)
        if not result[loser]:
            raise DataError(f"data.{loser} keeps no row: all of them stand in data.{keeper} too; name other sources")
    return result, dropped


def _identity_keys(record: Record) -> list[str]:
    """What a record is known by: its question, its group, and, where it has choices, that it is asked with choices."""
    return [record.question_hash(), *_group(record), *([_choices_key(record)] if record.choices else [])]


def _conflict_keys(record: Record) -> list[str]:
    """The marks of the records that it clashes with: its question with the same choices, or on one side with none.
    Two lists of choices make two questions: many an exam asks "Which of the following is true?".
    """
    return [
        record.question_hash(),
        *_group(record),
        record.question_hash(with_choices=False) if record.choices else _choices_key(record),
    ]


def _choices_key(record: Record) -> str:
    return f"choices {record.question_hash(with_choices=False)}"


def _group(record: Record) -> list[str]:
    return [f"group {record.group}"] if record.group else []


def carve_splits(
    records: Sequence[Record], shares: Mapping[SplitName, float], seed: int
) -> dict[SplitName, tuple[Record, ...]]:
    """Cut splits of about these shares off train, and `train`, the rest; records that belong together stay together.

    Each split gets one family at least, and a larger share only as far as whole families fit in. Raises `DataError`
    where there are fewer families than splits.
    """
    families = _related_clusters(records)
    if len(families) <= len(shares):
        unit = "groups" if any(record.group for record in records) else "different rows"
        raise DataError(
            f"data.train has {len(families)} {unit}, too few to split off {', '.join(shares)}: {len(shares) + 1} are "
            f"needed; add rows, or name sources for data.{' and data.'.join(shares)}"
        )
    left = sorted(families, key=lambda name: _digest([str(seed), name]))
    home: dict[str, SplitName] = {}
    for split, share in shares.items():
        for name in _choose_clusters(left, families, share * len(records)):
            home[name] = split
        left = [name for name in left if name not in home]
    split_of = {id(record): home.get(name, "train") for name, family in families.items() for record in family}
    names: tuple[SplitName, ...] = ("train", *shares)
    return {name: tuple(record for record in records if split_of[id(record)] == name) for name in names}


def _choose_clusters(names: Sequence[str], families: Mapping[str, Sequence[Record]], room: float) -> list[str]:
    chosen: list[str] = []
    for name in names:
        if len(families[name]) <= room:
            chosen.append(name)
            room -= len(families[name])
    return chosen or [min(names, key=lambda name: len(families[name]))]


def _related_clusters(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records joined where they share a question or a group, under a name that does not depend on their order."""
    parent: dict[str, str] = {}

    def root(mark: str) -> str:
        while parent.setdefault(mark, mark) != mark:
            parent[mark] = mark = parent[parent[mark]]
        return mark

    keys = [record.question_hash() for record in records]
    bare = {key for record, key in zip(records, keys, strict=True) if not record.choices}
    for record, key in zip(records, keys, strict=True):
        for mark in [*_group(record), *({record.question_hash(with_choices=False)} & bare)]:
            parent[root(mark)] = root(key)
    joined: dict[str, list[Record]] = defaultdict(list)
    for record, key in zip(records, keys, strict=True):
        joined[root(key)].append(record)
    return {min(record.split_sort_key() for record in family): family for family in joined.values()}


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
