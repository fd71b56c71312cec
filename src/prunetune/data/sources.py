"""Sources of records: files, globs, data sets of the Hugging Face hub, and `demo`."""

import glob
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from prunetune.config.recipe import DataConfig
from prunetune.config.recipe_paths import MAX_DEEP_STARS
from prunetune.data.demo import read_demo
from prunetune.data.formats import COMPRESSED, READERS, TEXT_FORMATS, UNTYPED, data_suffix, without_nulls
from prunetune.data.records import Record, record_from_row, unusable_rows
from prunetune.data.shapes import ShapedRow, shape_row
from prunetune.data.templates import ColumnMapping
from prunetune.errors import DataError, MissingPackage
from prunetune.utils.failures import typed_line
from prunetune.utils.files import expand_path
from prunetune.utils.hub_access import hub_failure
from prunetune.utils.redaction import SHOW_ALL, Redaction
from prunetune.utils.untrusted import shorten

log = logging.getLogger(__name__)
SplitName = Literal["train", "search", "valid", "test", "texts", "guard", "general"]
EXTRA_SPLITS: tuple[SplitName, ...] = ("texts", "guard", "general")  # often from elsewhere, so rows may lack data.group
# Names that a split may have on the hub, the first that exists is read.
HUB_SPLITS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "search": ("search", "train"),
    "valid": ("validation", "valid", "dev"),
    "test": ("test",),
    "texts": ("train",),
    "guard": ("validation", "valid", "dev", "test"),
    "general": ("test",),
}
SPLIT_STEM = re.compile(r"(train|search|valid|validation|val|dev|test|eval)(-\d+-of-\d+)?")
WEIGHT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
HUB_NAME = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.-]+))?(#(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Source:
    """A source of data as the user wrote it, with its weight."""

    path: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a source and its weight: "a.jsonl*2" counts double. Raises `DataError`.

        A glob that ends in a number needs a weight of its own.
        """
        path, _, factor = text.strip().rpartition("*")
        has_weight = path and WEIGHT.fullmatch(factor)
        path, weight = (path, float(factor)) if has_weight else (text.strip(), 1.0)
        if path.count("**") > MAX_DEEP_STARS:
            raise DataError(f"{shorten(path)}: more than {MAX_DEEP_STARS} ** take too long to match; write fewer")
        if not path:
            raise DataError("a data source is empty text; name a file, a glob, a hub name, or demo")
        if not 0 < weight < math.inf:
            raise DataError(
                f"{shorten(text)}: a source's weight must be above 0 and finite; leave a source out to ignore it"
            )
        return cls(path, weight)


@dataclass(frozen=True)
class SourceRow:
    """One row of a source, and the id and task that it gets if it has none."""

    fields: Any  # or the `DataError` that says why it cannot be read
    source: str  # "file:line"
    id: str
    task: str
    weight: float = 1.0
    is_typed: bool = True  # whether the source distinguishes 1 from "1"
    written: str = ""  # the source as the user wrote it

    def shaped(self, mapping: ColumnMapping | None = None, group_field: str = "") -> ShapedRow:
        """The row in its canonical form; raises `DataError`."""
        if isinstance(self.fields, DataError):
            raise self.fields
        try:
            return shape_row(self.fields, mapping, group_field=group_field, source=self.source)
        except DataError as wrong:
            if str(wrong).startswith(self.source):
                raise
            raise DataError(f"{self.source}: {wrong}", quoted=str(wrong)) from None

    def to_record(
        self, group_field: str = "", *, group_required: bool = True, shaped: ShapedRow | None = None
    ) -> Record:
        """The row, or what it was shaped into, as a record; raises `DataError`."""
        fields = (shaped or self.shaped(group_field=group_field)).fields
        return record_from_row(
            fields, source=self.source, id=self.id, task=self.task, weight=self.weight,
            group_field=group_field, group_required=group_required, is_typed=self.is_typed,
        )  # fmt: skip


def read_records(
    sources: Sequence[str], config: DataConfig, split: SplitName, redaction: Redaction = SHOW_ALL
) -> tuple[Record, ...]:
    """The records of all sources, in order; `split` is the split that is read of `demo` and of hub data sets.

    Logs what is not plain: shapes that were recognised, columns that are not used, rows that `data.bad_rows` drops.
    Raises `DataError` for a source or rows that cannot be used, and `MissingPackage` if one needs a package.
    """
    records, notes = read_records_with_notes(sources, config, split, redaction)
    for written, note in notes.items():
        if ";" in note:
            log.info("data.%s %s: %s", split, shorten(written), note)
    return records


def read_records_with_notes(
    sources: Sequence[str], config: DataConfig, split: SplitName, redaction: Redaction = SHOW_ALL
) -> tuple[tuple[Record, ...], dict[str, str]]:
    """`read_records`, and for each source one line on what its rows are read as; logs dropped rows only."""
    group_required = split not in EXTRA_SPLITS
    mapping = ColumnMapping.compile(config.columns)
    records: list[Record] = []
    bad: list[DataError] = []
    shapes: dict[str, Counter[str]] = defaultdict(Counter)
    unused: dict[str, Counter[str]] = defaultdict(Counter)
    for row in _rows(sources, config, split):
        if isinstance(row, Record):
            records.append(row)
            continue
        try:
            shaped = row.shaped(mapping, config.group)
            record = row.to_record(config.group, group_required=group_required, shaped=shaped)
        except DataError as wrong:
            bad.append(wrong)
            continue
        records.append(record)
        shapes[row.written][shaped.shape] += 1
        unused[row.written].update(shaped.unused if redaction.samples else ["other columns"] * bool(shaped.unused))
    if bad:
        total = len(bad) + len(records)
        if config.bad_rows == "error" or not records:
            raise unusable_rows(bad, total, "; data.bad_rows=drop leaves such rows out" if records else "")
        log.warning("data.%s leaves bad rows out: %s", split, redaction.message(unusable_rows(bad, total)))
    names = [name for counts in shapes.values() for name in counts]
    if mapping and split == "train" and names and not any(name.startswith("mapped") for name in names):
        raise DataError(
            f"data.columns names {', '.join(sorted(mapping.columns))}, and no row of data.train has one of them: "
            "correct the names, or leave data.columns out"
        )
    return tuple(records), {written: _note(shapes[written], unused[written]) for written in shapes}


def _note(shapes: Counter[str], unused: Counter[str]) -> str:
    """Such as "12 alpaca rows; prompt from instruction + input, completion from output; not used: label (12 rows)"."""
    parts = [f"{count:,} {shape}" for shape, count in shapes.items()]
    if unused:
        parts.append("not used: " + ", ".join(f"{shorten(name)} ({count:,} rows)" for name, count in unused.items()))
        if set(shapes) == {"text rows"}:
            parts.append("an answer belongs into completion, or into choices and answer")
    return "; ".join(parts)


def read_rows(sources: Sequence[str], config: DataConfig, split: SplitName) -> tuple[SourceRow, ...]:
    """The rows of all sources, in order, with fields unchecked; see `read_records`."""
    rows = []
    for row in _rows(sources, config, split):
        if isinstance(row, Record):  # of the demo, as the row it would have been in a file
            texts = {"prompt": row.prompt, "completion": row.completion}
            fields = {**texts, "choices": list(row.choices), "answer": row.answer}
            row = SourceRow(fields, row.source, row.id, row.task, row.weight)
        rows.append(row)
    unreadable = next((row.fields for row in rows if isinstance(row.fields, DataError)), None)
    if unreadable is not None:
        raise unreadable
    return tuple(rows)


def _rows(sources: Sequence[str], config: DataConfig, split: SplitName) -> Iterator[SourceRow | Record]:
    parsed = [Source.parse(source) for source in sources]
    files = {source: _matching_files(source.path, config) for source in parsed if source.path != "demo"}
    # Test and general rows are scored side by side, so their files get names that differ.
    others = [Source.parse(text).path for text in (*config.test, *config.general) if split in ("test", "general")]
    siblings = {file for path in others if path != "demo" for file in _matching_files(path, config)}
    names = {}  # of tasks: X/train.jsonl is task X, other files are named by their stem
    for path in siblings.union(*files.values()):
        folder = path.absolute().parent
        stem = Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem
        names[path] = (folder.name, folder.parent.name) if SPLIT_STEM.fullmatch(stem) else (stem, folder.name)
    folders = Counter(name for name, _ in set(names.values()))  # in several: the name of the folder comes in front
    tasks = {path: name if folders[name] == 1 else f"{parent}/{name}" for path, (name, parent) in names.items()}
    for source in parsed:
        if source.path == "demo":
            yield from read_demo(split, source.weight)
        elif files[source]:
            for path in files[source]:
                task, suffix, is_empty = tasks[path], data_suffix(path.name), True
                for line, row in READERS[suffix](path):
                    is_empty, id = False, f"{task}/{path.name}:{line}"
                    typed = suffix not in UNTYPED
                    yield SourceRow(row, f"{path}:{line}", id, task, source.weight, typed, source.path)
                if is_empty:
                    raise DataError(f"{path}: empty; a data file needs at least one row")
        else:
            yield from _hub_rows(source, split)


def _matching_files(path: str, config: DataConfig) -> tuple[Path, ...]:
    """The files that a path or glob matches; none for a hub name. Raises `DataError`."""
    file = expand_path(config.root) / expand_path(path)
    if file.is_dir():
        raise DataError(f"{file}: a folder; name its files, such as {path.rstrip('/')}/*.jsonl")
    pattern = str(Path(glob.escape(str(expand_path(config.root)))) / expand_path(path))
    matches = [file] if file.is_file() else map(Path, sorted(glob.glob(pattern, recursive=True)))
    files = tuple(match for match in matches if match.is_file())
    if not files and not (HUB_NAME.fullmatch(path) and not _has_reader(path)):
        reason = "no file matches this glob" if glob.has_magic(path) else "no such file"
        advice = "correct data.* or data.root, or name a hub data set as owner/name"
        if not config.root and Path(path).parts[-3:-2] in (("legal",), ("healthcare",), ("general",)):
            reason += ", and data.root is not given"
            advice = (
                "in a clone, --data.root examples/data takes a made-up sample, and "
                "`python benchmarks/data/build.py --out DATA` fetches the public sets for --data.root DATA"
            )
        raise DataError(f"{file}: {reason}; {advice}")
    for match in files:
        if not _has_reader(match.name):
            known = f"known are {', '.join(READERS)}, those of text also with {', '.join(COMPRESSED)} behind"
            advice = "save the sheet as CSV or .xlsx" if match.suffix.lower().startswith((".xls", ".ods")) else known
            raise DataError(f"{match}: ending {match.suffix!r} is not read; {advice}")
    return files


def hub_dataset(source: str) -> str:
    """The data set on the hub that a source names, without configuration, split and revision; "" for files."""
    path = Source.parse(source).path
    match = HUB_NAME.fullmatch(path)
    return match["name"] if match and not _has_reader(path) else ""


def _has_reader(path: str) -> bool:
    suffix = data_suffix(path)
    return suffix in (TEXT_FORMATS if Path(path.lower()).suffix in COMPRESSED else READERS)


def _hub_rows(source: Source, split: SplitName) -> Iterator[SourceRow]:
    match = HUB_NAME.fullmatch(source.path)
    assert match is not None, source.path
    name, config, splits = match["name"], match["config"], (match["split"],) if match["split"] else HUB_SPLITS[split]
    offline = hub_failure()  # without the hub, what is in the cache is read at once
    try:
        import datasets
    except ModuleNotFoundError as missing:
        raise MissingPackage(f"{source.path}: hub data sets need a package; run: pip install datasets") from missing
    rows: Iterator[Any] | None = None
    failure, at_revision = "", {"revision": match["revision"]} if match["revision"] else {}
    for loaded_split in splits:  # the first that the data set has is read; no code that comes with it is run
        try:
            loaded = datasets.load_dataset(name, *([config] if config else []), split=loaded_split, **at_revision)
            rows = iter(loaded)
        except ValueError as unknown_split:
            failure = failure or typed_line(unknown_split)
            continue
        except Exception as broken:  # the hub, the network or a parser: the user must see which name failed
            failure = typed_line(broken)
        break
    if rows is None:
        parts = (name, config and f"config {config}", f"split {' or '.join(splits)}", offline)
        tried = ", ".join(filter(None, parts))
        raise DataError(
            f"{source.path}: no such file, and not to be had from the hub ({tried}): {failure}; "
            "correct the name, or write owner/name:config@split#revision"
        )
    where, task = f"{re.split('[@#]', source.path)[0]}@{loaded_split}", name.rpartition("/")[2]
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except Exception as broken:  # the hub, the network or a parser: a part of a data set is another data set
            reason = typed_line(broken)
            raise DataError(
                f"{where}: reading failed after {number} rows: {reason}; run it again, or resume the run", quoted=reason
            ) from broken
        number += 1
        id = f"{where}:{number}"
        yield SourceRow(without_nulls(row), id, id, task, source.weight, written=source.path)
    if not number:
        raise DataError(f"{where}: empty; a data set needs at least one row")
