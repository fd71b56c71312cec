"""Sources: formats, globs, weights, task names, hub data sets; broken files and names refused in one line."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunetune.config.recipe import DataConfig, RunConfig
from prunetune.config.recipe_paths import start_from_recipe
from prunetune.data.sources import Source, read_records
from prunetune.errors import DataError, MissingPackage
from support.data import pairs, write_lines

ROWS = [
    {"prompt": "one, two", "completion": 'say "yes"', "choices": ['say "yes"', "no"], "answer": 0, "task": "t"},
    {"prompt": "line\nbreak\u2028end", "completion": "é漢", "choices": ["x", "é漢"], "answer": 1, "task": "t"},
]


def write_as(ending: str, path: Path) -> str:
    file = path / f"rows{ending}"
    if ending == ".json":
        file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif ending == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif ending in (".csv", ".tsv"):
        with file.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, list(ROWS[0]), delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows({**row, "choices": json.dumps(row["choices"])} for row in ROWS)
    else:
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8-sig")
    return str(file)


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_records(ending: str, tmp_path: Path) -> None:
    records = read_records([write_as(ending, tmp_path)], DataConfig(), "train")
    assert [(r.prompt, r.completion, r.choices, r.answer, r.task) for r in records] == [
        (row["prompt"], row["completion"], tuple(row["choices"]), row["answer"], row["task"]) for row in ROWS
    ]


def stars(ending: str, folder: Path, *columns: str, choices: str = '["1","2","3"]', cell: str = "1") -> list[str]:
    """The answers that a table of digits gives, where `cell` fills its last `columns`."""
    mark = "\t" if ending == ".tsv" else ","
    quoted = choices.replace('"', '""')
    header, row = ["prompt", "choices", *columns], ["How many?", f'"{quoted}"', *[cell] * len(columns)]
    file = folder / f"stars{ending}"
    file.write_text(f"{mark.join(header)}\n{mark.join(row)}\n", encoding="utf-8")
    return [record.completion for record in read_records([str(file)], DataConfig(), "test")]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_ambiguous_digits_of_a_table_are_refused(ending: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        stars(ending, tmp_path, "answer")
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'stars'}{ending}:2: answer 1 is the text of choices[0] and the index of ")
    assert "column completion" in message
    assert "JSON lines" in message
    assert "\n" not in message
    assert len(message) < 400
    # Each way out, and digits that mean one thing only.
    assert stars(ending, tmp_path, "completion") == stars(ending, tmp_path, "answer", "completion") == ["1"]
    assert stars(ending, tmp_path, "answer", cell="3") == ["3"]
    assert stars(ending, tmp_path, "answer", choices='["0","1","2"]') == ["1"]
    assert stars(ending, tmp_path, "answer", choices='["no","yes"]') == ["yes"]
    question = {"prompt": "How many?", "choices": ["1", "2", "3"]}
    lines = write_lines(tmp_path / "stars.jsonl", question | {"answer": 1}, question | {"answer": "1"})
    assert [record.completion for record in read_records([lines], DataConfig(), "test")] == ["2", "1"]


def test_csv_cells_may_be_long_empty_and_of_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f'text,task\n"a\nb",\n\n{"x" * 200_000},long\n', encoding="utf-8")
    limit = csv.field_size_limit()
    records = read_records([str(file)], DataConfig(), "train")
    assert [(r.completion[:3], r.task, r.source) for r in records] == [
        ("a\nb", "a", f"{file}:2"),
        ("xxx", "long", f"{file}:5"),
    ]
    assert csv.field_size_limit() == limit


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", "", {"text": "a"}, "  ", {"text": "b"})
    assert [r.source for r in read_records([source], DataConfig(), "train")] == [f"{source}:2", f"{source}:4"]


def test_files_of_test_and_general_have_names_that_differ(tmp_path: Path) -> None:
    for name in ("legal/text", "health/text", "general/quiz"):
        write_lines(tmp_path / name / "test.jsonl", {"text": name})
    general = ("health/text/test.jsonl", "general/quiz/test.jsonl")
    config = DataConfig(root=str(tmp_path), test=("legal/text/test.jsonl", "demo"), general=general)
    assert [record.task for record in read_records(config.test[:1], config, "test")] == ["legal/text"]
    assert [record.task for record in read_records(general, config, "general")] == ["health/text", "quiz"]
    assert [record.task for record in read_records(config.test[:1], config, "valid")] == ["text"]


def test_globs_under_a_root_have_weights_and_task_names(tmp_path: Path) -> None:
    for name in ("legal/text", "general/text", "legal/ask"):
        write_lines(tmp_path / name / "train.jsonl", *pairs(2, start=len(name)))
    write_lines(tmp_path / "extra.jsonl", {"text": "more"})
    config = DataConfig(root=str(tmp_path))
    records = read_records(["*/*/train.jsonl*0.5", "extra.jsonl*2e0"], config, "train")
    assert [(r.task, r.weight) for r in records[::2]] == [
        ("general/text", 0.5),
        ("ask", 0.5),
        ("legal/text", 0.5),
        ("extra", 2.0),
    ]
    assert len({r.id for r in records}) == len(records)
    assert str(tmp_path) not in records[0].id


def test_root_with_glob_characters_is_read_literally(tmp_path: Path) -> None:
    write_lines(tmp_path / "a[1]" / "x.jsonl", {"text": "a"})
    assert len(read_records(["*.jsonl"], DataConfig(root=str(tmp_path / "a[1]")), "train")) == 1


@pytest.mark.parametrize("weight", ["0", "-1", "1e400"])
def test_weights_are_above_zero_and_finite(weight: str) -> None:
    with pytest.raises(DataError, match="weight must be above 0"):
        Source.parse(f"a.jsonl*{weight}")


def test_glob_whose_stars_multiply_is_refused_before_it_is_matched(tmp_path: Path) -> None:
    """In forty folders within each other, twelve of them would try more than 10**11 paths."""
    (tmp_path / ("a/" * 40)).mkdir(parents=True)
    glob = "**/" * 12 + "x.jsonl"
    with pytest.raises(DataError, match=r"more than 3 \*\* take too long"):
        read_records([glob], DataConfig(root=str(tmp_path)), "train")
    (tmp_path / "recipe.yaml").write_text("")
    assert start_from_recipe(RunConfig, {"data": {"train": [glob]}}, tmp_path / "recipe.yaml", has_root=False)


BROKEN = [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON .*column"),
    ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a\.jsonl:2: row is \[1\]"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2: row has txt; it needs"),
    ("a.jsonl", b'{"text": [NaN]}\n', r"a\.jsonl:1: text must be text, got \[nan\]"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON \(it is nested too deeply\)"),
    ("a.jsonl", b"\n \n", r"a\.jsonl: empty"),
    ("a.jsonl", b"", r"a\.jsonl: empty"),
    ("a.json", b"[]", r"a\.json: empty"),
    ("a.json", b'[{"text": "a"}, 3]', r"a\.json:2: row is 3"),
    ("a.json", b"[1,\n2,\n", r"a\.json:3: not valid JSON"),
    ("a.csv", b"text\n", r"a\.csv: empty"),
    ("a.csv", b'text\n"open', r"a\.csv:2: not valid CSV"),
    ("a.csv", b"text\na,b\n", r"a\.csv:2: 2 cells under 1 column"),
    ("a.csv", b"prompt,choices,answer\np,a|b,0\n", r"a\.csv:2: column choices: not valid JSON"),
    ("a.csv", b"text\n\xff\n", r"a\.csv:2: not UTF-8"),
    ("a.parquet", b"no table", r"a\.parquet: not readable as Parquet"),
    ("a.parquet", b"", r"a\.parquet: not readable as Parquet"),
    ("a.txt", b"words", r"a\.txt: ending '\.txt' is not read; known are \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_are_refused_in_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refused:
        read_records([name], DataConfig(root=str(tmp_path)), "train")
    assert "\n" not in str(refused.value)


def test_huge_numbers_in_unused_fields_are_accepted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", '{"text": "a", "n": NaN, "m": ' + "9" * 6000 + ', "x": 1e999}')
    assert len(read_records([source], DataConfig(), "train")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", "no such file"),
        ("deep/none.jsonl", "no such file"),
        ("none", "no such file"),
        ("none-*.jsonl", "no file matches this glob"),
        ("folder", "a folder; name its files, such as"),
        ("", "empty text"),
    ],
)
def test_missing_sources_are_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        read_records([source], DataConfig(root=str(tmp_path)), "train")


class FakeHub:
    """Stands in for the datasets package: serves the splits of one data set and records its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[Any]], error: Exception | None = None):
        self.calls: list[tuple[Any, ...]] = []
        self.splits, self.error = splits, error
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=self.load_dataset))

    def load_dataset(self, path: str, name: str | None = None, *, split: str, **revision: str) -> list[Any]:
        self.calls.append((path, name, split, *revision.values()))
        if self.error is not None:
            raise self.error
        if split not in self.splits:
            raise ValueError(f'Unknown split "{split}".\nShould be one of {list(self.splits)}.')
        return self.splits[split]


def test_hub_names_read_the_split_of_their_option(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, {"train": pairs(2), "validation": pairs(1, 5), "odd": pairs(3, 9)})
    config = DataConfig()
    assert len(read_records(["owner/name*2"], config, "train")) == 2
    (record,) = read_records(["owner/name:small"], config, "valid")
    assert (record.task, record.source) == ("name", "owner/name:small@validation:1")
    assert len(read_records(["owner/name:small@odd"], config, "train")) == 3
    assert hub.calls == [
        ("owner/name", None, "train"),
        ("owner/name", "small", "validation"),
        ("owner/name", "small", "odd"),
    ]


@pytest.mark.parametrize("name", ["owner/name#v1.0", "owner/name@train#v1.0", "owner/name:small#refs/pr/1*2"])
def test_hub_rows_are_read_at_their_revision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, {"train": pairs(2)})
    records = read_records([name], DataConfig(), "train")
    ((_, _, split, revision),) = hub.calls
    assert (len(records), split, revision) == (2, "train", name.partition("#")[2].removesuffix("*2"))
    assert "#" not in records[0].source


def test_hub_rows_are_checked_like_file_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, {"train": [{"text": "a"}, {"body": "b"}]})
    with pytest.raises(DataError, match=r"^owner/name@train:2: row has body; it needs"):
        read_records(["owner/name"], DataConfig(), "train")


def test_hub_failures_name_config_and_splits_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, {"train": pairs(2)})
    with pytest.raises(DataError, match=r"owner/name.*validation or valid or dev.*Unknown split") as refused:
        read_records(["owner/name"], DataConfig(), "valid")
    assert "\n" not in str(refused.value)
    hub = FakeHub(monkeypatch, {}, ConnectionError("no\nnetwork"))
    with pytest.raises(DataError, match=r"no such file, and not to be had from the hub .*ConnectionError: no network"):
        read_records(["owner/name"], DataConfig(), "valid")
    assert len(hub.calls) == 1


def test_hub_stream_that_fails_midway_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[Any]:
        yield from pairs(3)
        raise ConnectionError("closed\nby the server")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows()))
    with pytest.raises(
        DataError, match=r"owner/name@train: reading failed after 3 rows: ConnectionError: closed"
    ) as refused:
        read_records(["owner/name"], DataConfig(), "train")
    assert "\n" not in str(refused.value)


def test_missing_package_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match="pip install datasets"):
        read_records(["owner/name"], DataConfig(), "train")


def test_existing_file_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, {"train": pairs(1)})
    write_lines(tmp_path / "owner" / "name", {"text": "a"})
    with pytest.raises(DataError, match="ending '' is not read"):
        read_records(["owner/name"], DataConfig(root=str(tmp_path)), "train")
    assert hub.calls == []
