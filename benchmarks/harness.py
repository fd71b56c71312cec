"""D3: two tasks that lm-eval ships, scored by lm-eval itself and by a suite of ours, on the same model and rows.

    python benchmarks/harness.py DATA [--model demo] [--limit 0]

DATA holds general/arc_easy/test.jsonl and healthcare/pubmedqa/test.jsonl (prompt, choices, answer). Their rows are
written as the hub's data sets have them; lm-eval's own task files arc_easy and pubmedqa are included with nothing
changed but where the rows come from (and no training or validation split). Ours say the same prompts as templates.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

INPUT, RESPONSE = "### Input:\n", "\n\n### Response:\n"
ARC = {
    "prompt": "Question: {{ question }}\nAnswer:",
    "choices": "(' ' ~ choices.text | join('\n ')).split('\n')",
    "answer": "choices.label.index(answerKey)",
}
PUBMEDQA = {
    "prompt": "Abstract: {{ CONTEXTS | join('\n') }}\nQuestion: {{ QUESTION }}\nAnswer:",
    "choices": "[' yes', ' no', ' maybe']",
    "answer": "' ' ~ final_decision",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=0, help="0: all rows")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        folder = Path(place)
        write_rows(options.data, folder, options.limit)
        write_tasks(folder)
        print(json.dumps(compare(folder, options), indent=1))


def write_rows(data: Path, folder: Path, limit: int) -> None:
    """The rows as ai2_arc and pubmed_qa have them."""
    for name, source, shape in (
        ("arc_easy", "general/arc_easy", arc_row),
        ("pubmedqa", "healthcare/pubmedqa", pubmedqa_row),
    ):
        lines = (data / source / "test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [shape(json.loads(line)) for line in lines][: limit or None]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def asked(row: dict[str, Any]) -> str:
    """What stands between the headers."""
    return str(row["prompt"]).partition(INPUT)[2].removesuffix(RESPONSE)


def arc_row(row: dict[str, Any]) -> dict[str, Any]:
    labels = ["A", "B", "C", "D", "E"][: len(row["choices"])]
    choices = {"text": row["choices"], "label": labels}
    return {"id": row["id"], "question": asked(row), "choices": choices, "answerKey": labels[row["answer"]]}


def pubmedqa_row(row: dict[str, Any]) -> dict[str, Any]:
    abstract, _, question = asked(row).removeprefix("Abstract: ").rpartition("\nQuestion: ")
    return {"id": row["id"], "CONTEXTS": [abstract], "QUESTION": question, "final_decision": row["completion"]}


def write_tasks(folder: Path) -> None:
    """lm-eval's task files over the local rows."""
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent
    for name, file in (("arc_easy", "arc/arc_easy.yaml"), ("pubmedqa", "pubmedqa/pubmedqa.yaml")):
        task = {
            "include": str(shipped / file),
            "task": f"local_{name}",
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "training_split": None,
            "validation_split": None,
        }
        (folder / f"local_{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from prunetune.evaluation.suites import LocalModel, evaluate_suite, parse_suite
    from prunetune.model.loading import load_model_and_tokenizer

    def ours(data: str, likelihood: str, shape: dict[str, str]) -> dict[str, Any]:
        return {"data": f"{data}.jsonl", "limit": 0, "scorer": "accuracy", "likelihood": likelihood, **shape}

    tasks: dict[str, Any] = {
        "arc_easy acc": ours("arc_easy", "sum", ARC),
        "arc_easy acc_norm": ours("arc_easy", "characters", ARC),
        "pubmedqa acc": ours("pubmedqa", "sum", PUBMEDQA),
        "arc_easy": {"lm_eval": "local_arc_easy", "include": ".", "limit": 0},
        "pubmedqa": {"lm_eval": "local_pubmedqa", "include": ".", "limit": 0},
    }
    opened = load_model_and_tokenizer(options.model, device=torch.device(options.device), dtype=torch.float32)
    found = evaluate_suite(
        LocalModel(opened.model, opened.tokenizer), parse_suite({"tasks": tasks}, folder=folder)
    ).tasks
    rows = []
    for name in list(tasks)[:3]:
        task, metric = name.split()
        if found[name].error or found[task].error:
            raise SystemExit(found[name].error or found[task].error)
        mine, theirs = found[name].scores["accuracy"], found[task].scores[metric]
        by_prompt = {item.prompt: item.scores["accuracy"] for item in found[name].items}
        rows.append(
            {
                "task": task,
                "metric": metric,
                "lm_eval": theirs.value,
                "prunetune": mine.value,
                "equal_to_4_decimals": round(theirs.value, 4) == round(mine.value, 4),
                "items": mine.n,
                "items_that_differ": sum(by_prompt[item.prompt] != item.scores[metric] for item in found[task].items),
            }
        )
    return rows


if __name__ == "__main__":
    main()
