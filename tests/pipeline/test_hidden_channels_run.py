"""A run that prunes hidden channels: what stock transformers opens, exports, sizes, a second pruning, a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from prunetune import export_run
from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import ConfigError
from prunetune.export.gguf import llamacpp
from prunetune.manifest import Manifest
from prunetune.pipeline.run import run
from prunetune.plan import Plan
from prunetune.train.progress import TrainingProgress
from support.data import pairs, subwords, write_lines
from support.models import tiny

NAME = "model:hidden-channels"
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "layout": "uniform",
    # No other unit may lose more than half, so that channels have to go.
    "budget": {"keep": 0.5, "of": "model", "align": 8, "min_share": 0.5}
    | {"units": ["hidden-channels", "kv-groups", "mlp-channels"]},
    "train": {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1},
    "search": {"init_batches": 1, "cuts": 2, "span": 0.5},
    "distill": {"teacher": "base", "hidden": 1.0},
    "evaluate": {"drift": False, "limit": 4, "generate_limit": 1, "max_new_tokens": 4, "dense_tuned": False},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("source"), subwords()
    options: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "groups": 4, "ratio": 1}
    for family, dtype in (("llama", torch.float32), ("gemma3_text", torch.bfloat16)):
        tied = family == "gemma3_text"
        tiny(family, tie_word_embeddings=tied, **options).to(dtype).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    write_lines(folder / "rows.jsonl", *pairs(30))
    return folder


def config_of(source: Path, out: Path, family: str = "llama", **changes: Any) -> RunConfig:
    paths = {"model": str(source / family), "data": {"train": [str(source / "rows.jsonl")]}, "out": str(out)}
    return from_mapping(merge_mappings(merge_mappings(RECIPE, paths), changes))


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config_of(source, tmp_path_factory.mktemp("finished") / "run"))


def test_stock_class_opens_the_narrow_model_with_the_checked_logits(finished: Path) -> None:
    config = AutoConfig.from_pretrained(finished / "model")
    kept = len(Plan.load(finished / "plan.json").kept[NAME])
    assert config.model_type in ("llama", "mistral")
    assert (config.hidden_size, config.head_dim) == (kept, 8)
    assert kept < 48
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    facts = Manifest.from_json((finished / "manifest.json").read_text())
    assert facts.selfcheck.ok
    assert facts.selfcheck.max_relative <= 1e-5
    params = sum(weight.numel() for weight in model.parameters())
    dense = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(facts.model.name).parameters())
    assert (facts.pruned.params, facts.model.params) == (params, dense)
    assert 0.4 * dense < params <= 0.5 * dense
    assert facts.limits.kept == pytest.approx(params / dense)
    assert json.loads((finished / "model" / "history.json").read_text())[-1]["params"] == params


def test_card_report_and_records_say_both_shares(finished: Path) -> None:
    card, page = (finished / "model" / "README.md").read_text(), (finished / "report.html").read_text()
    facts = Manifest.from_json((finished / "manifest.json").read_text())
    assert f"{100 * facts.pruned.params / facts.model.params:.1f}% of all parameters remain" in card
    assert "hidden channel" in card
    assert "Hidden size" in page
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kept"] == pytest.approx(facts.pruned.params / facts.model.params)


def test_gguf_export_has_the_narrow_stream_and_opens_in_llama_cpp(finished: Path) -> None:
    result = export_run(finished, "gguf")
    assert [check.ran for check in result.checks] == [True, bool(llamacpp.runtime_version())]
    kept = len(Plan.load(finished / "plan.json").kept[NAME])
    fields = gguf.GGUFReader(result.path).fields
    assert fields["llama.embedding_length"].contents() == kept


class Killed(Exception):
    """In place of a signal, which would end the tests as well."""


def test_killed_and_resumed_run_is_the_uninterrupted_one(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = TrainingProgress.record_step

    def interrupt(progress: TrainingProgress, line: Any, decision: Any) -> None:
        record(progress, line, decision)
        if line["step"] == 4:  # after both cuts, before the checkpoint of this step
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "record_step", interrupt)
        with pytest.raises(Killed):
            run(config_of(source, tmp_path / "run"))
    assert run(config_of(source, tmp_path / "run"), resume=True) == tmp_path / "run"
    expected, found = (load_file(folder / "model" / "model.safetensors") for folder in (finished, tmp_path / "run"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_sizes_are_nested_and_the_smaller_one_is_pruned_again(source: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"layout": "per-layer", "budget": {"keep": [0.6, 0.45]}}
    folder = run(config_of(source, tmp_path / "run", "gemma3_text", **changes))
    large, small = (Plan.load(folder / "sizes" / size / "plan.json") for size in ("0.6", "0.45"))
    assert all(set(kept) <= set(large.kept[name]) for name, kept in small.kept.items())
    assert len(small.kept[NAME]) < 48
    first = folder / "sizes" / "0.45" / "model"
    again: dict[str, Any] = {"model": str(first), "layout": "per-layer", "budget": {"keep": 0.8, "min_share": 0.7}}
    again |= {"trust_remote_code": True, "train": {"weights": "adapters"}}
    second = run(config_of(source, tmp_path / "again", **again))
    plan = Plan.load(second / "plan.json")
    assert plan.units[NAME] == len(small.kept[NAME])
    config = json.loads((second / "model" / "config.json").read_text())
    assert config["hidden_size"] == len(plan.kept[NAME])
    params = [entry["params"] for entry in json.loads((second / "model" / "history.json").read_text())]
    assert params[1] <= 0.8 * params[0]


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [({"search": {"method": "generator"}}, "search.method generator"), ({"budget": {"latency": "0.8"}}, "latency")],
)
def test_what_cannot_cross_layers_is_refused_by_name(
    source: Path, tmp_path: Path, changes: dict[str, Any], obstacle: str
) -> None:
    with pytest.raises(ConfigError, match=f"hidden-channels.*{obstacle}|{obstacle}.*hidden-channels"):
        run(config_of(source, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_sites_names_hidden_channels_and_their_widths(source: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = say("sites", str(source / "llama"), "--units", "hidden-channels", "--units", "mlp-channels")
    assert code == 0
    assert "multiples of 8 from 8 to 48, the same in all layers" in out
