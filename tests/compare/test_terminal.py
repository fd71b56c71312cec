"""What `prunetune compare` prints: the verdict, and tables that fit 80 columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunetune.compare.charts import draw_cost_charts, method_styles
from prunetune.compare.markdown import render_markdown, verdict_sentences
from prunetune.compare.table import aggregate
from prunetune.compare.terminal import render_comparison
from prunetune.config.recipe import from_mapping
from support.comparison import failed, realistic
from support.page import ATTACK, steering

TRANSFORMERS = {"runtime": "transformers 5.23.0", "device": "NVIDIA H200"}
LLAMACPP = {"runtime": "llama.cpp (xllamacpp 2026.10)", "device": "16 CPU threads"}
RIVAL = "rival-SmolLM2-135M-Instruct"


def timed_comparison() -> dict[str, Any]:
    """Dense, pruned and a rival, each also in a format; pruned ones lose less than 2% and are faster."""
    methods = ("dense", "progressive", RIVAL)
    cells = realistic(methods, [0.96], [0])
    for cell in cells:
        cell["bytes"] = 270e6 if cell["method"] == "dense" else 200e6
        scored = {key: cell[key] for key in ("headline", "scores", "items")}
        cell["formats"] = {"q4_k_m": {**scored, "bytes": cell["bytes"] / 4}}
    cells.append(failed("random", "no memory", keep=0.96))
    config = from_mapping({"compare": {"keeps": [0.96]}})
    table = aggregate(cells, dict.fromkeys((*methods, "random"), 1e-3), config)
    for row in table["rows"]:
        place = LLAMACPP if "+" in row["method"] else TRANSFORMERS
        times = {"token_s": 0.004 if "dense" in row["method"] else 0.002, "first_token_s": 0.01, "peak_bytes": 1e9}
        row["speed"] = place | times
        if row["method"] == "progressive":
            row["speed"] |= {"token_s": 0.0015, "times_faster": [2.0, 1.9, 2.1]}
        if row["method"] == f"{RIVAL}+q4_k_m":
            row["speed"] = {"note": "llama.cpp has no place for it"}
    return table | {"best": {"method": "progressive+q4_k_m", "seed": 0, "path": "best/exports/gguf-q4_k_m.gguf"}}


def test_verdict_names_the_smallest_its_path_and_the_fastest_with_its_runtime() -> None:
    assert verdict_sentences(timed_comparison()) == [
        "The smallest weights within 2% of dense in loss: progressive+q4_k_m with 4% removed, 50 of 270 MB.",
        "Those of seed 0 are kept in best/exports/gguf-q4_k_m.gguf.",
        "The fastest of those as good: progressive, 1.5 ms a token in transformers 5.23.0 on NVIDIA H200, 2.00 times "
        "as fast as dense (1.90 to 2.10); dense takes 4 ms a token in transformers 5.23.0 on NVIDIA H200.",
    ]


def test_verdict_says_that_the_winner_has_no_file() -> None:
    best = {"method": "progressive+q4_k_m", "seed": 0, "path": "best"}
    words = "Those of seed 0 are kept in best, but could not be written as q4_k_m: see the log."
    assert verdict_sentences(timed_comparison() | {"best": best})[1] == words


def test_printed_comparison_fits_80_columns_and_names_its_files(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(timed_comparison()))
    lines = render_comparison(tmp_path, width=80).replace(str(tmp_path), "RUN").splitlines()
    assert max(map(len, lines)) <= 80, "\n".join(lines)
    assert lines[0].startswith("The smallest weights within 2% of dense")
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("method", "dense", "progressive"))}
    assert rows["method"] == ["method", "kept", "MB", "NLL", "over", "dense", "accuracy", "ms", "a", "token"]
    assert rows["dense"][1:3] == ["100.0%", "270"]
    assert rows["progressive"][-1] == "1.5"
    assert "failed: random-keep0.96-seed0: no memory" in lines
    assert lines[-3:] == [
        "table RUN/table.md", "page  RUN/comparison.html", "best  RUN/best/exports/gguf-q4_k_m.gguf",
    ]  # fmt: skip


def test_names_and_errors_steer_no_terminal(tmp_path: Path) -> None:
    comparison = timed_comparison()
    for row in comparison["rows"]:
        row["method"] = row["method"].replace(RIVAL, ATTACK)
    comparison["errors"] = [{"cell": ATTACK, "error": ATTACK}]
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    assert not steering(render_comparison(tmp_path))


def test_each_runtime_has_a_chart_of_quality_over_latency_and_untimed_rows_a_note() -> None:
    comparison = timed_comparison()
    rows = comparison["rows"]
    styles = method_styles([row["method"] for row in rows], "progressive")
    charts = draw_cost_charts(rows, styles)
    assert [chart.title for chart in charts] == [
        "Mean NLL by size of the weights",
        "Mean NLL by time a token in transformers",
        "Mean NLL by time a token in llama.cpp",
    ]
    assert charts[2].note.startswith("Measured in turns in llama.cpp (xllamacpp 2026.10) on 16 CPU threads.")
    table = render_markdown(comparison)
    assert "| weights MB | ms a token | ms to the first | memory MB | timed in |" in table
    assert "Not timed:\n\n- rival-SmolLM2-135M-Instruct+q4_k_m: llama.cpp has no place for it" in table
