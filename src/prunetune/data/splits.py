"""The splits of a run, from train to general; missing ones are carved off train, overlaps are refused."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from prunetune.config.recipe import DataConfig
from prunetune.data.records import Record
from prunetune.data.sources import EXTRA_SPLITS, Source, SplitName, read_records
from prunetune.errors import DataError
from prunetune.utils.redaction import SHOW_ALL, Redaction

CARVED: tuple[SplitName, ...] = ("test", "valid", "search")  # in this order: test first

# Records in both splits of a pair are refused, or dropped from the first.
DISJOINT: tuple[tuple[SplitName, SplitName], ...] = (
    ("valid", "test"), ("search", "test"), ("search", "valid"),
    ("train", "test"), ("train", "valid"), ("train", "search"), ("texts", "test"), ("texts", "valid"),
    ("guard", "test"),  # limits decide by the guard, so its rows are not reported as test scores
    ("train", "guard"), ("search", "guard"), ("texts", "guard"),
    ("train", "general"), ("search", "general"), ("valid", "general"), ("texts", "general"), ("guard", "general"),
)  # fmt: skip


@dataclass(frozen=True)
class Splits:
    """The records of a run; no two splits share a question or a group."""

    train: tuple[Record, ...]
    search: tuple[Record, ...]
    valid: tuple[Record, ...]
    test: tuple[Record, ...]
    texts: tuple[Record, ...] = ()  # unlabelled, for distillation
    guard: tuple[Record, ...] = ()  # scored during the run to check limits
    general: tuple[Record, ...] = ()  # scored beside test, kept out of the means
    dropped: int = 0  # records left out because another split has them too

    def by_name(self) -> dict[SplitName, tuple[Record, ...]]:
        """The records by the name of their split; texts, guard and general only where there are any."""
        splits: dict[SplitName, tuple[Record, ...]] = {name: getattr(self, name) for name in get_args(SplitName)}
        return {name: records for name, records in splits.items() if records or name not in EXTRA_SPLITS}

    @property
    def hashes(self) -> dict[str, str]:
        """{split: SHA-256 of its records in order}."""
        return {name: _digest(record.content_json() for record in records) for name, records in self.by_name().items()}


def load_splits(config: DataConfig, seed: int, redaction: Redaction = SHOW_ALL) -> Splits:
    """Read the splits that have sources, and carve the others off train; the same for a seed, in any order of rows.

    Raises `DataError` for data that cannot be used, for splits that overlap, and if train is too small to carve.
    """
    if not config.train:
        raise DataError("data.train names no source; name a file, a glob, a hub data set as owner/name, or demo")
    sources: dict[SplitName, Sequence[str]] = {
        "train": config.train, "search": config.search, "valid": config.valid, "test": config.test,
    }  # fmt: skip
    if all(Source.parse(source).path == "demo" for source in config.train):  # it has all but texts, guard and general
        sources = {name: own or ("demo",) for name, own in sources.items()}
    sources |= {"texts": config.distill_texts, "guard": config.guard, "general": config.general}
    splits = {name: read_records(own, config, name, redaction) for name, own in sources.items() if own}
    splits, dropped = _make_disjoint(splits, drop=config.overlap == "drop")
    shares = {"search": config.search_share, "valid": config.valid_share, "test": config.test_share}
    missing = {name: shares[name] for name in CARVED if name not in splits}
    splits |= carve_splits(splits["train"], missing, seed)
    if "texts" in splits:
        # They may repeat train itself. The guard needs no such check: train was disjoint from it before the carving.
        carved = {key for name in missing for record in splits[name] for key in _identity_keys(record)}
        texts = tuple(record for record in splits["texts"] if carved.isdisjoint(_conflict_keys(record)))
        if not texts:
            raise DataError(
                f"data.distill_texts keeps no row: all {len(splits['texts'])} share a question or group with splits "
                "that are carved off data.train; name more texts, or sources for data.test, data.valid and data.search"
            )
        dropped += len(splits["texts"]) - len(texts)
        splits["texts"] = texts
    return Splits(**splits, dropped=dropped)


def _make_disjoint(
    splits: Mapping[SplitName, tuple[Record, ...]], *, drop: bool
) -> tuple[dict[SplitName, tuple[Record, ...]], int]:
    """(the splits without overlaps, number of records dropped); raises `DataError` for an overlap without `drop`."""
    result, dropped = dict(splits), 0
    all_records = [record for records in splits.values() for record in records]
    identity_keys = {id(record): _identity_keys(record) for record in all_records}
    conflict_keys = {id(record): _conflict_keys(record) for record in all_records}
    for loser, keeper in DISJOINT:
        if loser not in result or keeper not in result:
            continue
        kept = {key: record for record in result[keeper] for key in identity_keys[id(record)]}
        conflicts = [(record, key) for record in result[loser] for key in conflict_keys[id(record)] if key in kept]
        shared = {id(record) for record, _ in conflicts}
        if shared and not drop:
            record, key = conflicts[0]
            group = repr(record.group) if key.startswith("group ") else ""
            reason = f"group {group}" if group else "the same question"
            raise DataError(
                f"{_option(loser)} and {_option(keeper)} overlap: {len(shared)} of {len(result[loser])} rows of "
                f"{loser}, first {record.source} with {reason} as {kept[key].source}; "
                f"set data.overlap=drop to leave them out of {loser}, or correct the files",
                quoted=group,
            )
        result[loser] = tuple(record for record in result[loser] if id(record) not in shared)
        dropped += len(shared)
        if not result[loser]:
            raise DataError(f"{_option(loser)} keeps no row: all are in {_option(keeper)} too; name other sources")
    return result, dropped


def _option(split: SplitName) -> str:
    return "data.distill_texts" if split == "texts" else f"data.{split}"


def _identity_keys(record: Record) -> list[str]:
    """Keys of a record: its question, its group, and the question with any choices if it has choices."""
    return [record.question_hash(), *_group(record), *([_choices_key(record)] if record.choices else [])]


def _conflict_keys(record: Record) -> list[str]:
    """Identity keys of the records that this one must not share splits with: same group, or same question.

    Two lists of choices make two questions, since many an exam asks "Which of the following is true?"; a question
    without choices conflicts with any. A chat is tuned on the answers to its earlier questions, too.
    """
    return [
        record.question_hash(),
        *record.earlier_question_hashes(),
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
    """{split: records} of about these shares of train, and "train" itself, the rest.

    Records that share a question or a group form a cluster, which is in one split. Each split gets one cluster at
    least, and more as long as they fit into its share. Raises `DataError` if there are too few clusters.
    """
    clusters = _related_clusters(records)
    if len(clusters) <= len(shares):
        unit = "groups" if any(record.group for record in records) else "different rows"
        raise DataError(
            f"data.train has {len(clusters)} {unit}, too few to split off {', '.join(shares)}: {len(shares) + 1} are "
            f"needed; add rows, or name sources for data.{' and data.'.join(shares)}"
        )
    remaining = sorted(clusters, key=lambda name: _digest([str(seed), name]))
    split_by_cluster: dict[str, SplitName] = {}
    for split, share in shares.items():
        chosen, space = [], share * len(records)
        for name in remaining:
            if len(clusters[name]) <= space:
                chosen.append(name)
                space -= len(clusters[name])
        chosen = chosen or [min(remaining, key=lambda name: len(clusters[name]))]
        split_by_cluster |= dict.fromkeys(chosen, split)
        remaining = [name for name in remaining if name not in split_by_cluster]
    split_of = {id(record): split_by_cluster.get(name, "train") for name in clusters for record in clusters[name]}
    names: tuple[SplitName, ...] = ("train", *shares)
    return {name: tuple(record for record in records if split_of[id(record)] == name) for name in names}


def _related_clusters(records: Sequence[Record]) -> dict[str, list[Record]]:
    """{name: records that share a question or a group}, by union-find; names do not depend on the order of records."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    questions = [record.question_hash() for record in records]
    without_choices = {question for record, question in zip(records, questions, strict=True) if not record.choices}
    for record, question in zip(records, questions, strict=True):
        asked = {record.question_hash(with_choices=False), *record.earlier_question_hashes()} & without_choices
        for key in [*_group(record), *asked]:
            parent[root(key)] = root(question)
    clusters: dict[str, list[Record]] = defaultdict(list)
    for record, question in zip(records, questions, strict=True):
        clusters[root(question)].append(record)
    return {min(record.split_sort_key() for record in cluster): cluster for cluster in clusters.values()}


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
