"""The figures in the prose of README and guides: each computed again from the file of results that one command wrote.

`tables.py` writes them as a table into benchmarks/README.md, and `tests/test_figures.py` holds the pages to them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from merged import comparison_of, megabytes_of

from prunetune.compare.markdown import markdown_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "quality" / "results"
COMPARED = "quality/on_gpus.py quality/cells/bars.yaml, as below", "quality/results/legal.json, healthcare.json"
FLOORS = "quality/floors.py, as below", "quality/results/floors.json"
COMPUTED = "scaling_table.py", "computed on shapes"
GENERAL = "ppl general/text"
SPEED = "llama-3-8b, 0.6 kept, prompt 2048, recorded, bfloat16: "


@dataclass(frozen=True)
class Claim:
    """A figure: its name, the words around it ({} is the figure), its form, command and file, value, and page."""

    name: str
    text: str
    form: str
    source: tuple[str, str]
    value: Callable[[], float]
    page: str = "README.md"

    def figure(self) -> str:
        """The figure as the page writes it."""
        return self.form.format(self.value())


def row_of(bar: str, case: str) -> dict[str, Any]:
    """The last row of results.jsonl of this bar whose case begins with these words."""
    lines = (ROOT / "benchmarks" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["bar"] == bar and row["case"].startswith(case)]
    if not rows:
        raise LookupError(f"results.jsonl has no row of {bar} that begins with {case!r}")
    return dict(rows[-1])


def measured(name: str, text: str, form: str, bar: str, case: str, find: str = "") -> Claim:
    """A claim from a row of results.jsonl: its value, or the number that `find` finds in its case."""
    row = row_of(bar, case)
    found = re.search(find, row["case"])
    number = float(found[1].replace(",", "")) if find and found else row["value"]
    return Claim(name, text, form, (row["command"], f"results.jsonl, {bar}"), lambda: number)


def score(domain: str, keep: float, metric: str, method: str = "progressive") -> float:
    """A mean score of a method at one budget, or its cost in seconds."""
    row = next(row for row in comparison_of(RESULTS / f"{domain}.json", keep)["rows"] if row["method"] == method)
    return float(row["cost_seconds"] if metric == "cost" else row["scores"][metric]["value"])


def costs() -> list[float]:
    """Mean seconds of a run of 135M with its teacher, by domain and budget, sorted."""
    return sorted(score(domain, keep, "cost") for domain in ("legal", "healthcare") for keep in (0.6, 0.4))


def change(domain: str, metric: str) -> float:
    """A score with 40% removed minus that of the dense model with equal help."""
    return score(domain, 0.6, metric) - score(domain, 0.6, metric, "dense-equal-help")


def ratio(domain: str, metric: str) -> float:
    """A score with 40% removed, over that of the dense model with equal help."""
    return score(domain, 0.6, metric) / score(domain, 0.6, metric, "dense-equal-help")


def lead(domain: str, keep: float) -> float:
    """The loss of OBS, the best two-stage method, minus that of progressive removal."""
    return score(domain, keep, "nll", "obs") - score(domain, keep, "nll")


def remembered(kind: str) -> list[float]:
    """By how many percent a perplexity is below that of OBS, sorted: of the `own`, the `other` domain or `general`."""
    other = {"legal": "healthcare", "healthcare": "legal"}
    metric = {domain: f"ppl {({'own': domain, 'other': other[domain]}).get(kind, kind)}/text" for domain in other}
    pairs = [(domain, keep) for domain in other for keep in (0.6, 0.4)]
    return sorted(100 * (1 - score(d, k, metric[d]) / score(d, k, metric[d], "obs")) for d, k in pairs)


def floor(domain: str) -> float:
    """Mean over the tuned tasks of the best accuracy that needs no model."""
    tasks = json.loads((RESULTS / "floors.json").read_text(encoding="utf-8"))["domains"][domain].values()
    best = [max(v for k, v in task.items() if k not in ("rows", "tuned")) for task in tasks if task["tuned"]]
    return sum(best) / len(best)


def gigabytes(name: str) -> float:
    """Most GPU memory of a run in 4 bits, rank 32, layers recomputed, untuned teacher, 1,024 tokens a pass."""
    sys.path.append(str(ROOT / "benchmarks"))
    from scaling_table import peak, usual

    model, setup = usual(name)
    setup = replace(setup, quantize="nf4", recompute=True, rank=32, teacher=True, distills_hidden=True)
    return peak(model, replace(setup, teacher_is_base=True)) / 1e9


def claims() -> list[Claim]:
    """All figures of the prose of README and guides, in their order."""
    return [*readme_claims(), *guide_claims()]


def readme_claims() -> list[Claim]:
    """Figures of README's prose."""
    legal, two_gpus = (
        RESULTS / "legal.json",
        "Llama-3-8B geometry, 12,288 tokens, DDP on 2 GPUs over one: throughput of a tuning",
    )
    demo, run_8b = (
        "fresh clone and environment, README's first command",
        "8B geometry, 2 x 2,048 tokens, untuned teacher",
    )
    decode, memory = (
        SPEED + "decode ratio dense over pruned, per-layer, ",
        SPEED + "peak memory pruned over dense, per-layer, ",
    )
    shrink = lambda: 1 - megabytes_of(legal, 0.6) / megabytes_of(legal, 1)  # noqa: E731
    return [
        Claim("weights removed", "Weights shrink by {}", "{:.0%}", COMPARED, shrink),
        measured("decoding, one prompt", "decodes {} times", "{:.2f}", "F3", decode + "batch 1 "),
        measured("decoding, 32 prompts", "and {} times with 32", "{:.2f}", "F3", decode + "batch 32"),
        measured("memory of one prompt", "memory is {} times", "{:.2f}", "F3", memory + "batch 1"),
        Claim("loss, legal", "the loss is {} higher on legal", "{:.3f}", COMPARED, lambda: change("legal", "nll")),
        Claim("loss, healthcare", "and {} on healthcare", "{:.3f}", COMPARED, lambda: change("healthcare", "nll")),
        Claim("accuracy, legal", "by {} and", "{:+.1f}", COMPARED, lambda: 100 * change("legal", "acc")),
        Claim("accuracy, healthcare", "and {} points", "{:+.1f}", COMPARED, lambda: 100 * change("healthcare", "acc")),
        Claim("general perplexity, legal", "perplexity is {} and", "{:.1f}", COMPARED, lambda: ratio("legal", GENERAL)),
        Claim(
            "the same, healthcare", "and {} times the dense", "{:.1f}", COMPARED, lambda: ratio("healthcare", GENERAL)
        ),
        Claim("accuracy without a model, legal", "average {} and", "{:.3f}", FLOORS, lambda: floor("legal")),
        Claim("the same, healthcare", "and {} ([how", "{:.3f}", FLOORS, lambda: floor("healthcare")),
        measured("demo: time", "{} s where we measured", "{:.0f}", "A1", demo),
        measured("demo: memory", "| {} MiB of memory", "{:,.0f}", "A1", demo, r"([\d,]+) MiB"),
        Claim("135M: shortest mean time", "{} to", "{:.0f}", COMPARED, lambda: costs()[0]),
        Claim("135M: longest mean time", "to {} s on an H200", "{:.0f}", COMPARED, lambda: costs()[-1]),
        measured("8B: memory", "| {} GB, ", "{:.1f}", "M6", run_8b + ": peak", r"\(([\d.]+) to"),
        measured("8B: time", "{} s for 700 steps", "{:.0f}", "M6", run_8b + " on half", r"\((\d+) to"),
        Claim("8B in 4 bits: memory", "| {} GB, computed |", "{:.1f}", COMPUTED, lambda: gigabytes("llama-3-8b")),
        Claim("70B in 4 bits: memory", "| {} GB on each", "{:.1f}", COMPUTED, lambda: gigabytes("llama-3-70b")),
        measured("8B on two GPUs", "an 8B step {} times", "{:.1f}", "G1", two_gpus),
    ]


def guide_claims() -> list[Claim]:
    """Figures of the guides' prose, and of tables that no mark makes."""
    lora = lambda domain, metric: (score(domain, 0.6, metric), score(domain, 0.6, metric, "dense"))  # noqa: E731
    method: list[tuple[str, str, str, Callable[[], float]]] = [
        ("lead, legal, 40%", "by {} (40% removed)", "{:.3f}", lambda: lead("legal", 0.6)),
        ("lead, legal, 60%", "and {} (60%) nats", "{:.3f}", lambda: lead("legal", 0.4)),
        ("lead, healthcare, 60%", "{} below at 60%", "{:.3f}", lambda: lead("healthcare", 0.4)),
        ("domain perplexity, least", "domain perplexity is {} to", "{:.0f}", lambda: remembered("own")[0]),
        ("domain perplexity, most", "to {}% lower, general", "{:.0f}", lambda: remembered("own")[-1]),
        ("general perplexity, least", "general perplexity {} to", "{:.0f}", lambda: remembered("general")[0]),
        ("general perplexity, most", "to {}%, the other", "{:.0f}", lambda: remembered("general")[-1]),
        ("other domain, least", "the other domain's {} to", "{:.0f}", lambda: remembered("other")[0]),
        ("other domain, most", "to {}%. -", "{:.0f}", lambda: remembered("other")[-1]),
        ("below LoRA, legal", "loss is {} below the dense", "{:.3f}", lambda: -np.subtract(*lora("legal", "nll"))),
        ("above equal help, legal", "and {} above the dense model with", "{:.3f}", lambda: change("legal", "nll")),
        ("above LoRA, healthcare", "it is {} above the", "{:.3f}", lambda: np.subtract(*lora("healthcare", "nll"))),
        ("general perplexity, legal", "perplexity is {} times", "{:.1f}", lambda: np.divide(*lora("legal", GENERAL))),
        ("the same, healthcare", "perplexity is {} times", "{:.1f}", lambda: np.divide(*lora("healthcare", GENERAL))),
    ]
    run_8b, latency = (
        "8B geometry, 2 x 2,048 tokens, untuned teacher",
        "SmolLM2-135M-Instruct, legal, seed 0, 16 x (2048 + 8)",
    )
    int4, int8 = (f"SmolLM2-135M, per-layer, --quantize {kind}" for kind in ("int4", "int8"))
    same = "SmolLM2 {} in transformers 5.23.0 against the gated model"
    rows: dict[str, list[tuple[str, ...]]] = {
        "scaling": [
            ("8B: time, of Trainer's", "takes {} times as long", "{:.2f}", "M6", run_8b + " on half"),
            ("8B: memory, of Trainer's", "and {} times its memory", "{:.2f}", "M6", run_8b + ": peak"),
        ],
        "budgets": [
            ("a million of attention", "| {} us,", "{:,.0f}", "F4", latency, r"attention ([\d.]+),"),
            ("a million of the MLP", "us, {} us |", "{:.0f}", "F4", latency, r"mlp ([\d.]+);"),
            ("kept for a latency", "kept {}% of the parameters", "{:.0f}", "F4", latency, r"keeps ([\d.]+)%"),
            ("its standard error", "(standard error {})", "{:.3f}", "F4", latency, r"error ([\d.]+)\)"),
        ],
        "deploy": [
            ("logits, uniform", "logits within {} |", "{:.1e}", "C2", same.format("uniform")),
            ("logits, per-layer", "| logits within {} |", "{:.1e}", "C2", same.format("per-layer")),
            ("int4: error", "| int4 | {}% |", "{:.0f}", "C2", int4),
            ("int4: tokens", "| {}% of the most likely", "{:.0f}", "C2", int4, r"(\d+)% of most"),
            ("int4: size", "equal, {} MB instead", "{:.0f}", "C2", int4, r"([\d.]+) MB"),
            ("int8: error", "| int8 | {}% |", "{:.0f}", "C2", int8),
        ],
    }
    found = [Claim(name, text, form, COMPARED, value, "docs/method.md") for name, text, form, value in method]
    return found + [replace(measured(*row), page=f"docs/guides/{page}.md") for page, of in rows.items() for row in of]


def claims_table(file: Path) -> str:
    """Each figure, and the command and file that it comes from; `file` is results.jsonl."""
    assert file == ROOT / "benchmarks" / "results.jsonl"
    rows = [[claim.page.removeprefix("docs/"), claim.name, claim.figure(), *claim.source] for claim in claims()]
    return markdown_table(["page", "claim", "figure", "command", "file"], rows) + "\n"
