"""Where records come from: files, globs, names on the Hugging Face hub, and the word `demo`."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prunetune.config.recipe import DataConfig
from prunetune.data.demo import read_demo
from prunetune.data.formats import READERS, UNTYPED, read_file_rows
from prunetune.data.records import Record, record_from_row
from prunetune.errors import DataError, MissingPackage

SplitName = Literal["train", "search", "valid", "test", "texts", "guard"]
EXTRA_SPLITS: tuple[SplitName, ...] = (
    "texts",
    "guard",
)  # often of another origin, whose rows know nothing of data.group

HUB_SPLITS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "search": ("search", "train"),
    "valid": ("validation", "valid", "dev"),
    "test": ("test",),
    "texts": ("train",),
    "guard": ("validation", "valid", "dev", "test"),
}
SPLIT_STEM = re.compile(r"(train|search|valid|validation|val|dev|test|eval)(-\d+-of-\d+)?")
WEIGHT = re.compile(r"(?P<path>.+)\*(?P<weight>[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?)", re.IGNORECASE)
HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """A source as the user wrote it, taken apart."""

    path: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        """Split a weight off: "a.jsonl*2" counts double. (A glob that ends in a number needs a weight of its own.)"""
        match = WEIGHT.fullmatch(text.strip())
        path, weight = (match["path"], float(match["weight"])) if match else (text.strip(), 1.0)
        if not path:
            raise DataError("a data source is empty text; name a file, a glob, a hub name, or demo")
        if not 0 < weight < math.inf:
            raise DataError(f"{text}: a source's weight must be above 0 and finite; leave a source out to ignore it")
        return cls(path, weight)


@dataclass(frozen=True)
class SourceRow:
    """One row as its source holds it, and what it is called where it does not say so itself."""

    fields: Any
    source: str  # "file:line"
    id: str
    task: str
    weight: float = 1.0
    is_typed: bool = True  # whether the source tells 1 from "1"

    def to_record(self, group_field: str = "", *, group_required: bool = True) -> Record:
        """The row as a record; raises `DataError`."""
        return record_from_row(
            self.fields, source=self.source, id=self.id, task=self.task, weight=self.weight,
            group_field=group_field, group_required=group_required, is_typed=self.is_typed,
        )  # fmt: skip


def read_records(sources: Sequence[str], config: DataConfig, split: SplitName) -> tuple[Record, ...]:
    """The records of all sources, in order; `split` says which part of `demo` or of a hub data set is meant.

    Raises `DataError` for a source or a row that cannot be used, and `MissingPackage` where one needs a package.
    """
    found = _found(sources, config, split)
    grouped = split not in EXTRA_SPLITS
    return tuple(
        row if isinstance(row, Record) else row.to_record(config.group, group_required=grouped) for row in found
    )


def read_rows(sources: Sequence[str], config: DataConfig, split: SplitName) -> tuple[SourceRow, ...]:
    """The same as rows that nothing has been asked of yet."""
    return tuple(
        SourceRow(_fields(row), row.source, row.id, row.task, row.weight) if isinstance(row, Record) else row
        for row in _found(sources, config, split)
    )


def _found(sources: Sequence[str], config: DataConfig, split: SplitName) -> Iterator[SourceRow | Record]:
    parsed = [Source.parse(source) for source in sources]
    files = {source: _files(source.path, config) for source in parsed if source.path != "demo"}
    tasks = _task_names({path for found in files.values() for path in found})
    for source in parsed:
        if source.path == "demo":
            yield from read_demo(split, source.weight)
        elif found := files[source]:
            for path in found:
                yield from _of_file(path, tasks[path], source.weight)
        else:
            yield from _of_hub(source, split)


def _fields(record: Record) -> dict[str, Any]:
    """A record of the demo as the row it would have been in a file."""
    return {
        "prompt": record.prompt,
        "completion": record.completion,
        "choices": list(record.choices),
        "answer": record.answer,
    }


def _files(path: str, config: DataConfig) -> tuple[Path, ...]:
    """The files that a path or glob names; none for what must be a hub name."""
    place = Path(config.root).expanduser() / Path(path).expanduser()
    if place.is_dir():
        raise DataError(f"{place}: a folder; name its files, such as {path.rstrip('/')}/*.jsonl")
    pattern = str(Path(glob.escape(config.root)).expanduser() / Path(path).expanduser())
    hits = [str(place)] if place.is_file() else sorted(glob.glob(pattern, recursive=True))
    found = tuple(Path(hit) for hit in hits if Path(hit).is_file())
    if not found and not (HUB_NAME.fullmatch(path) and not _has_ending(path)):
        what = "no file matches this glob" if glob.has_magic(path) else "no such file"
        raise DataError(f"{place}: {what}; correct data.* or data.root, or name a hub data set as owner/name")
    for hit in found:
        if not _has_ending(hit.name):
            raise DataError(f"{hit}: ending {hit.suffix!r} is not read; known are {', '.join(READERS)}")
    return found


def _has_ending(path: str) -> bool:
    return Path(path).suffix.lower() in READERS


def _task_names(paths: set[Path]) -> dict[Path, str]:
    """X/train.jsonl is task X, other files go by their stem; the folder above tells apart those of one name."""
    names = {path: _task_parts(path) for path in paths}
    folders = Counter(name for name, _ in set(names.values()))
    return {path: name if folders[name] == 1 else f"{above}/{name}" for path, (name, above) in names.items()}


def _task_parts(path: Path) -> tuple[str, str]:
    folder = path.absolute().parent
    return (folder.name, folder.parent.name) if SPLIT_STEM.fullmatch(path.stem) else (path.stem, folder.name)


def _of_file(path: Path, task: str, weight: float) -> Iterator[SourceRow]:
    empty = True
    for line, row in read_file_rows(path):
        empty = False
        yield SourceRow(
            row, f"{path}:{line}", f"{task}/{path.name}:{line}", task, weight, path.suffix.lower() not in UNTYPED
        )
    if empty:
        raise DataError(f"{path}: empty; a data file needs at least one row")


def _of_hub(source: Source, split: SplitName) -> Iterator[SourceRow]:
    match = HUB_NAME.fullmatch(source.path)
    assert match is not None, source.path
    named = match["split"]
    part, rows = _load_hub_split(match["name"], match["config"], (named,) if named else HUB_SPLITS[split], source.path)
    where, task = f"{source.path.partition('@')[0]}@{part}", match["name"].rpartition("/")[2]
    number = 0
    for number, row in enumerate(_iterate_or_raise(rows, where), 1):
        yield SourceRow(row, f"{where}:{number}", f"{where}:{number}", task, source.weight)
    if not number:
        raise DataError(f"{where}: empty; a data set needs at least one row")


def _iterate_or_raise(rows: Iterator[Any], where: str) -> Iterator[Any]:
    """All rows; raises `DataError` where they break off: a part of a data set is another data set."""
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as broken:  # the hub, the network or a parser
            raise DataError(
                f"{where}: broke off after {number} rows: {_one_line(broken)}; run it again, a resumed run goes on"
            ) from broken
        number += 1
        yield row


def _load_hub_split(name: str, config: str | None, splits: tuple[str, ...], written: str) -> tuple[str, Iterator[Any]]:
    """The first of `splits` that the data set has. No code that comes with a data set is run."""
    try:
        import datasets
    except ModuleNotFoundError as missing:
        raise MissingPackage(f"{written}: hub data sets need a package; run: pip install datasets") from missing
    failure = ""
    for split in splits:
        try:
            return split, iter(datasets.load_dataset(name, *([config] if config else []), split=split))
        except ValueError as unknown_split:
            failure = failure or _one_line(unknown_split)
        except Exception as broken:  # the hub, the network or a parser: the user must see which name failed
            failure = _one_line(broken)
            break
    tried = f"{name}{f', config {config}' if config else ''}, split {' or '.join(splits)}"
    raise DataError(
        f"{written}: no such file, and not to be had from the hub ({tried}): {failure}; "
        "correct the name, or write owner/name:config@split"
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
