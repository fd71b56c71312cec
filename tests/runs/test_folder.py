"""Laws of a run folder's records: what will be done again is dropped, and no line is fatal."""

from __future__ import annotations

import json
from pathlib import Path

from prunetune.runs.folder import RunFolder


def test_dropping_records_keeps_earlier_steps_and_survives_odd_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (0, 1, 2, 3):
        folder.append_record("metrics.jsonl", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": "2"}\n{"loss": 1}\n[2]\n{"step": 1')
    folder.drop_records_after(2)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0}, {"step": 1}, {"step": 2}]
    folder.drop_records_after(-1)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == ""
