"""Files of JSON lines: written records are read back, and broken lines are counted."""

from __future__ import annotations

from pathlib import Path

from prunetune.utils.json_lines import append_json_line, read_json_lines, write_json_lines

RECORDS = [{"step": 1, "loss": 0.1, "text": "line\u2028end"}, {"step": 2, "loss": 1e-30}]


def test_records_are_read_back(tmp_path: Path) -> None:
    for record in RECORDS:
        append_json_line(tmp_path / "a.jsonl", record)
    write_json_lines(tmp_path / "b.jsonl", RECORDS)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert read_json_lines(tmp_path / "a.jsonl") == (RECORDS, 0)


def test_lines_without_a_record_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 1}\n\n[2]\n\xff\n{"step": 2}\n{"st')
    assert read_json_lines(tmp_path / "a.jsonl") == ([{"step": 1}, {"step": 2}], 3)
