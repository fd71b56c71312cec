"""Planted regressions in a tiny trained model: `prunetune check` reports each with the right items."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetune.baselines import Calibration
from prunetune.baselines.scores import wanda_sp
from prunetune.cli import app
from prunetune.config.recipe import DataConfig
from prunetune.data.batches import collate
from prunetune.data.encoding import encode
from prunetune.data.records import Record
from prunetune.export.checkpoint import write_checkpoint
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.sites import find_sites
from support.data import write_lines
from support.evaluation import characters, speaker

LETTERS = "abcdefgh"
CASES = 64


def rows() -> list[dict[str, Any]]:
    """64 questions: two letters and the third that follows, which a model has to memorise."""
    table = torch.randint(0, 4, (CASES,), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {"prompt": f"{LETTERS[n // 8]}{LETTERS[n % 8]}=", "choices": list("wxyz"), "answer": right, "id": f"k{n}"}
        for n, right in enumerate(table)
    ]


def examples() -> Any:
    records = [
        Record(kind="completion", prompt=row["prompt"], completion=row["choices"][row["answer"]]) for row in rows()
    ]
    return encode(records, characters(), DataConfig(), 64).examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dense/`, a model that memorised the table, and the suite."""
    workspace = tmp_path_factory.mktemp("planted")
    model = speaker(max_position_embeddings=64).train()
    batch = collate(examples(), 0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if loss < 0.02:
            break
    save(model.eval(), workspace / "dense")
    write_lines(workspace / "table.jsonl", *rows())
    # The likelihood of right answers falls before answers flip: it sees what accuracy cannot yet.
    limits = {"accuracy": {"statistical": True}, "nll": {"statistical": True}}
    task = {"data": "table.jsonl", "scorer": ["accuracy", "nll"], "limits": limits}
    (workspace / "suite.yaml").write_text(yaml.safe_dump({"tasks": {"table": task}}))
    return workspace


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    characters().save_pretrained(folder)


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()


def without_channels(folder: Path, to: Path) -> None:
    """Remove the 5% of MLP channels with the highest scores from every layer."""
    model = dense(folder)
    sites = tuple(find_sites(model))
    scores = wanda_sp(Calibration(model, sites, (collate(examples(), 0),)))
    kept = {
        site.name: tuple(
            sorted(
                scores[site.name].argsort(descending=True).tolist()[round(0.05 * site.units) * (site.kind == "mlp") :]
            )
        )
        for site in sites
    }
    plan = Plan(kept, {site.name: site.units for site in sites})
    write_checkpoint(cut(model, plan), characters(), plan, sites, to, layout="uniform", card="")


def corrupted_head(folder: Path, to: Path) -> None:
    """Shift the output rows of the answers by one."""
    model = dense(folder)
    ids = torch.tensor(characters()("wxyz", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        model.lm_head.weight[ids] = model.lm_head.weight[ids.roll(1)].clone()
    save(model, to)


def mixed_tokenizer(folder: Path, to: Path) -> None:
    """Swap the token ids of two letters."""
    shutil.copytree(folder / "dense", to)
    tokenizer = json.loads((to / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (to / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


@torch.inference_mode()
def right_by_hand(folder: Path) -> set[str]:
    """Rows whose right choice is the likeliest, scored one at a time without the suite."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    result = set()
    for row in rows():
        logits = model(torch.tensor([tokenizer(row["prompt"])["input_ids"]])).logits[0, -1]
        ids = [tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in row["choices"]]
        if int(logits[ids].argmax()) == row["answer"]:
            result.add(row["id"])
    return result


def checked(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    monkeypatch.setenv("PRUNETUNE_CACHE", str(folder / "cache"))
    flags = ["--suite", folder / "suite.yaml", "--against", folder / "dense", "--json", folder / "found.json"]
    monkeypatch.setattr("sys.argv", ["prunetune", "check", *map(str, [folder / model, *flags, "--device", "cpu"])])
    try:
        code = app._run_app()
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("plant", [without_channels, corrupted_head, mixed_tokenizer])
def test_planted_regression_is_caught_with_the_right_items(
    folder: Path, plant: Callable[[Path, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(folder, folder / plant.__name__)
    knew, knows = right_by_hand(folder / "dense"), right_by_hand(folder / plant.__name__)
    assert len(knew) > 0.9 * CASES
    code, result = checked(folder, plant.__name__, monkeypatch)
    assert code == 1
    assert "nll" in [verdict["limit"]["metric"] for verdict in result["verdicts"] if verdict["broken"]]
    assert {failure["id"] for failure in result["failures"]} == knew - knows


def test_identical_model_passes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "dense", folder / "same")
    code, result = checked(folder, "same", monkeypatch)
    assert (code, result["failures"], result["ok"]) == (0, [], True)
