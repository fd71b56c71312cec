"""Law: the same model, file and metric give the same number from a run, `eval`, `check` and a limit on scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune import check, evaluate, evaluate_suite, run
from prunetune.compare import scoring
from prunetune.config.recipe import DataConfig, EvaluateConfig, from_mapping
from prunetune.data.sources import read_records
from prunetune.evaluation import score_records
from prunetune.evaluation.results import Evaluation
from prunetune.evaluation.suites import LocalModel, Suite, parse_suite
from prunetune.evaluation.suites.options import CheckOptions
from prunetune.pipeline import monitor, stages
from support.data import subwords, write_lines
from support.evaluation import characters, speaker
from support.models import tiny

ON_CPU = CheckOptions(device="cpu", dtype="float32", cache=False)
MAX_NEW_TOKENS = 6
FLOAT32 = 1e-5  # relative
BFLOAT16 = 2e-2  # relative: a run takes a right choice's NLL from its choices' pass, `eval` scores it by itself
LONG = "which chapter holds this diagnosis "
METRICS = {
    "choice": {"accuracy", "macro_f1", "nll"},
    "written": {"rouge_l", "exact_match", "nll"},
    "chat": {"rouge_l", "exact_match", "nll"},
    "prose": {"perplexity", "bits_per_byte"},
}


def write_rows(folder: Path, *, long: int) -> dict[str, str]:
    """Write a file for each kind of row; one row of each is `long` times longer than the others."""
    times = [1, 2, 1, 3, long]
    rows: dict[str, list[dict[str, Any]]] = {
        "choice": [
            {"prompt": f"{LONG * n}{i}: ", "choices": ["yes", "no", "maybe not"], "answer": i % 3, "id": f"c{i}"}
            for i, n in enumerate(times)
        ],
        "written": [{"prompt": f"{LONG * n}{i} ", "completion": f"answer {i}"} for i, n in enumerate(times)],
        "chat": [
            {"messages": [{"role": "user", "content": LONG * n}, {"role": "assistant", "content": f"yes {i}"}]}
            for i, n in enumerate(times)
        ],
        "prose": [{"text": f"the quick föx {LONG * n}{i}"} for i, n in enumerate(times)],
    }
    return {task: write_lines(folder / f"{task}.jsonl", *of_task) for task, of_task in rows.items()}


def suite_over(files: dict[str, str], template: str = "auto") -> Suite:
    scorers = {
        "choice": ["accuracy", "macro_f1", "nll"],
        "written": ["rouge", "exact_match", "nll"],
        "chat": ["rouge", "exact_match", "nll"],
        "prose": ["perplexity"],
    }
    options = {"limit": 0, "template": template, "max_new_tokens": MAX_NEW_TOKENS}
    return parse_suite(
        {"tasks": {task: {"data": [file], "scorer": scorers[task], **options} for task, file in files.items()}}
    )


def assert_same_scores(of_run: Evaluation, of_eval: Evaluation, rel: float = FLOAT32) -> None:
    """Compare every metric of the run, its standard error, and every item."""
    assert {name: set(result.scores) for name, result in of_run.tasks.items()} == METRICS
    assert not [result.error for result in of_eval.tasks.values() if result.error]
    for name, result in of_run.tasks.items():
        for metric, score in result.scores.items():
            other = of_eval.tasks[name].scores[metric]
            assert (score.value, score.n) == (pytest.approx(other.value, rel=rel), other.n), f"{name}.{metric}"
            assert score.se == pytest.approx(other.se, rel=100 * rel, abs=rel), f"{name}.{metric}"
        for mine, theirs in zip(result.items, of_eval.tasks[name].items, strict=True):
            assert (mine.id, mine.prompt, mine.expected, mine.got) == (
                theirs.id, theirs.prompt, theirs.expected, theirs.got,
            )  # fmt: skip
            assert mine.correct == theirs.correct
            for metric, value in mine.scores.items():
                assert value == pytest.approx(theirs.scores[metric], rel=rel), f"{name}.{mine.id}.{metric}"


@pytest.mark.parametrize("template", ["auto", "raw", "chat"])
@pytest.mark.parametrize("max_tokens", [16384, 1])  # rows padded to one pass, and each row alone
@pytest.mark.parametrize(("family", "dtype", "rel"), [
    ("llama", torch.float32, FLOAT32), ("gemma3_text", torch.float32, FLOAT32), ("llama", torch.bfloat16, BFLOAT16),
])  # fmt: skip
def test_run_scores_rows_as_a_suite_does(
    family: str, dtype: torch.dtype, rel: float, max_tokens: int, template: Any, tmp_path: Path
) -> None:
    """Rows are choices, generated answers, chats and texts; one of each is longer than the model's context of 64."""
    model, tokenizer = tiny(family, vocab_size=len(subwords()), max_position_embeddings=64).to(dtype), subwords()
    files = write_rows(tmp_path, long=30)
    data = DataConfig(template=template, max_length=16, too_long="drop")  # about tuning, not about scores
    records = read_records(list(files.values()), data, "test")
    config = EvaluateConfig(limit=0, max_new_tokens=MAX_NEW_TOKENS, max_tokens=max_tokens)
    of_run = score_records.evaluate(model, tokenizer, records, data, config)
    of_eval = evaluate_suite(LocalModel(model, tokenizer), suite_over(files, template))
    assert_same_scores(of_run, of_eval, rel)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A real run on test rows of every kind, and the files of these rows."""
    folder = tmp_path_factory.mktemp("one_evaluator")
    model, tokenizer = speaker(), characters()
    tokenizer.chat_template = subwords().chat_template
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    files = write_rows(folder, long=4)
    train = [{"prompt": f"Case {n}: ", "completion": f"{n} {n}"} for n in range(24)]
    guard = [{"prompt": f"Guard {n}: ", "completion": f"{n} is {n + 1}"} for n in range(6)]
    recipe = {
        "model": str(folder / "dense"),
        "out": str(folder / "run"),
        "device": "cpu",
        "dtype": "float32",
        "data": {
            "train": [write_lines(folder / "train.jsonl", *train)],
            "test": list(files.values()),
            "guard": [write_lines(folder / "guard.jsonl", *guard)],
        },
        "budget": {"keep": 0.6, "align": 8},
        "train": {"steps": 4, "batch_size": 4, "validate_every": 2},
        "search": {"share": 0.5, "init_batches": 1, "batch_size": 4},
        "distill": {"teacher": "none"},
        "lora": {"rank": 4},
        "evaluate": {"limit": 0, "generate_limit": 50, "max_new_tokens": MAX_NEW_TOKENS, "dense_tuned": False},
    }
    return run(from_mapping(recipe), command="prunetune run"), files


@pytest.mark.parametrize("name", ["pruned", "dense"])
def test_eval_gives_the_scores_of_a_run(name: str, tuned: tuple[Path, dict[str, str]]) -> None:
    folder, files = tuned
    of_run = Evaluation.from_json((folder / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))
    model = folder if name == "pruned" else folder.parent / "dense"
    assert_same_scores(of_run, evaluate(str(model), suite_over(files), options=ON_CPU))


def test_check_gives_the_scores_of_a_run(tuned: tuple[Path, dict[str, str]]) -> None:
    folder, files = tuned
    result = check(str(folder), suite_over(files), options=ON_CPU)  # against the run's dense model
    assert result.errors == {}
    for position, name in enumerate(("pruned", "dense")):
        of_run = Evaluation.from_json((folder / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))
        for task, task_result in of_run.tasks.items():
            for metric, score in task_result.scores.items():
                assert result.scores[task][metric][position] == pytest.approx(score.value, rel=FLOAT32)


def test_limit_reads_the_scores_that_eval_gives(tuned: tuple[Path, dict[str, str]]) -> None:
    folder, _ = tuned
    dense = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["validation"]["dense"]
    task = {"data": [str(folder.parent / "guard.jsonl")], "scorer": "perplexity"}
    scores = evaluate(str(folder.parent / "dense"), parse_suite({"tasks": {"guard": task}}), options=ON_CPU).tasks
    assert dense["guard.perplexity"] == pytest.approx(scores["guard"].scores["perplexity"].value, rel=FLOAT32)


def test_run_compare_and_limits_call_one_function() -> None:
    assert stages.evaluate is scoring.evaluate is monitor.evaluate is score_records.evaluate
