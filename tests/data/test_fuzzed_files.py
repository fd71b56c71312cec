"""Law of data files: whatever is in one is rows, or refused in one line that names the file."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetune.config.recipe import ColumnsConfig, DataConfig
from prunetune.data.sources import read_records
from support.fuzz import ODD, damaged, fuzzed, refused_or_fine, torn

ROWS: list[dict[str, Any]] = [
    {"prompt": "Where?", "completion": "Here", "id": "a", "task": "t", "group": 1},
    {"prompt": "Where?", "choices": ["Here", "There"], "answer": 1},
    {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here"}]},
    {"text": "Here it is"},
    {"instruction": "Say.", "input": "Where?", "output": "Here", "system": "s"},
    {"conversations": [{"from": "human", "value": "Where?"}, {"from": "function_call", "value": "{}"}], "tools": "[]"},
    {"question": "Where?", "opa": "Here", "opb": "There", "cop": 1},
    {
        "question": {"stem": "Where?", "choices": [{"label": "A", "text": "x"}, {"label": "B", "text": "y"}]},
        "answerKey": "A",
    },
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "chosen": [], "rejected": "x"},
]


def as_csv(rows: list[Any]) -> str:
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["prompt", "completion", "choices", "answer", "text", "messages"])
    for row in rows:
        cells = row if isinstance(row, dict) else {"prompt": row}
        writer.writerow([cells.get(name) for name in ("prompt", "completion", "choices", "answer", "text", "messages")])
    return table.getvalue()


FILES = {
    "a.jsonl": lambda rows: "\n".join(map(json.dumps, rows)),
    "a.json": json.dumps,
    "a.csv": as_csv,
    "a.tsv": lambda rows: as_csv(rows).replace(",", "\t"),
    "a.parquet": json.dumps,
}


@given(
    name=st.sampled_from(sorted(FILES)),
    rows=st.lists(st.one_of(*map(damaged, ROWS), ODD, st.sampled_from(ROWS)), min_size=1, max_size=3),
    data=st.data(),
)
@fuzzed(40)
def test_any_file_is_rows_or_refused(
    name: str, rows: list[Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = FILES[name](rows).encode("utf-8", "surrogatepass")
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(data.draw(torn(content)) if data.draw(st.booleans()) else content)
    columns = data.draw(
        st.sampled_from([{}, {"completion": "answer"}, {"text": "{{ messages[0].role }}{{ question }}"}])
    )
    config = DataConfig(
        group=data.draw(st.sampled_from(("", "group"))),
        columns=ColumnsConfig(**columns),
        bad_rows=data.draw(st.sampled_from(("error", "drop"))),
    )
    with refused_or_fine():
        for record in read_records([str(file)], config, "train"):
            record.question_hash()
            record.content_json().encode()


@given(source=st.one_of(ODD.map(str), st.text(max_size=30)), root=st.sampled_from(("", ".", "~nosuchuser", "x" * 300)))
@fuzzed(40)
def test_any_source_is_found_or_refused(
    source: str, root: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused_or_fine():
        read_records([source if "/" not in source else f"./{source}"], DataConfig(root=root), "train")
