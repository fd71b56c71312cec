"""The model card: provenance, scores with standard errors, usage, and the base's licence."""

from __future__ import annotations

import math
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunetune.config.fields import fields_by_path
from prunetune.config.recipe import RunConfig, from_mapping
from prunetune.errors import MissingPackage
from prunetune.evaluation.results import Evaluation, Score, TaskResult
from prunetune.export.model_card import Provenance, ScoreRow, format_export_card, format_model_card
from prunetune.manifest import Manifest
from prunetune.model import provenance
from prunetune.model.provenance import LicenseInfo, PruningRun, read_license
from prunetune.pipeline.finish import card_scores, render_card, rewrite_card
from prunetune.pruning.sites import find_sites
from prunetune.runs.folder import RunFolder
from support.models import random_plan, tiny
from support.page import ATTACK, steering

MODEL = tiny("llama")
MANIFEST: dict[str, Any] = {
    "versions": {"python": "3.11", "prunetune": "0.1.0"},
    "commit": "abc123",
    "data": {"hashes": {"train": "t" * 64, "test": "e" * 64}},
    "model": {"params": 2_000_000, "decoder_params": 1_000_000, "bytes": 8_000_000},
    "pruned": {"params": 1_500_000, "decoder_params": 500_000, "bytes": 3_000_000, "dtype": "bfloat16"},
}


@pytest.fixture(autouse=True)
def _one_model_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = {"owner/name": Path("config.json"), "owner/name@main": Path("config.json")}
    monkeypatch.setattr(provenance, "cached_hub_file", lambda name, file: cached.get(name) if "json" in file else None)


def card_of(**values: Any) -> str:
    config = from_mapping({"model": "owner/name", "budget": {"keep": 0.5}, "out": "secret/place"})
    manifest = Manifest.from_dict(values.pop("manifest", MANIFEST))
    provenance = Provenance(config=config, manifest=manifest, **values)
    return format_model_card(provenance, random_plan(MODEL), find_sites(MODEL))


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_names_base_licence_recipe_and_data() -> None:
    card = card_of(licence=LicenseInfo("llama3.2", "", "https://licence", "its model card"), recipe_sha256="c" * 64)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "license": "llama3.2",
        "license_link": "https://licence",
        "tags": ["prunetune", "pruning"],
    }
    for text in ("`owner/name`", "prunetune 0.1.0", "`abc123`", "`budget.keep: 0.5`", "t" * 64, "e" * 64, "c" * 64):
        assert text in card
    assert "| weights on disk, bfloat16 | 8.0 MB | 3.0 MB |" in card
    assert "llama3.2, https://licence, as its model card says" in card
    assert "secret" not in card


def test_card_holds_no_path_and_no_name_of_a_column() -> None:
    """Of a text that a user may choose freely, only limits, budgets and hub names are published."""
    texts = {path: "hush" for path, item in fields_by_path(RunConfig).items() if item.type in (str, "str")}
    texts |= {
        path: ("hush/a.jsonl",)
        for path, item in fields_by_path(RunConfig).items()
        if item.type in (tuple[str, ...], "tuple[str, ...]")
    }
    config = RunConfig()
    public = {"limits", "report_to", "budget.quality_of", "budget.quality_limits", "budget.protect"}
    public |= {f"budget.{kind}" for kind in ("flops", "memory", "file", "latency", "throughput", "vocab")}
    for path in texts.keys() - public:
        section, _, name = path.rpartition(".")
        owner = operator.attrgetter(section)(config) if section else config
        object.__setattr__(owner, name, texts[path])
    object.__setattr__(config.data, "train", ("hush/a.jsonl", "owner/rows:small@train*2"))
    history = [PruningRun("models/hush", "uniform", 0.5, 10, 3), PruningRun("hush/model", "uniform", 0.5, 10, 3)]
    card = format_model_card(
        Provenance(config, Manifest.from_dict(MANIFEST), history=history), random_plan(MODEL), find_sites(MODEL)
    )
    assert "hush" not in card
    assert "`data.train: ['owner/rows:small@train*2']`" in card
    assert "# A local model, tuned and pruned" in card
    assert "1. a local model: 50.0%" in card


@pytest.mark.parametrize(
    ("name", "base"), [("owner/name", "owner/name"), ("owner/name@main", "owner/name"), ("models/llama", "")]
)
def test_base_model_is_a_hub_name_only(name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_mapping({"model": name})
    provenance = Provenance(config, Manifest.empty())
    card = format_model_card(provenance, random_plan(MODEL), find_sites(MODEL))
    assert front_matter(card).get("base_model", "") == base
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)  # a folder of that name is what is opened
    assert "base_model" not in front_matter(format_model_card(provenance, random_plan(MODEL), find_sites(MODEL)))


def test_card_names_cuts_and_a_chosen_learning_rate() -> None:
    trials = [{"rate": 5e-4, "valid_nll": 2.0}, {"rate": 1e-3, "valid_nll": None}]
    chosen = {"rate": 5e-4, "trials": trials, "steps": 70, "seconds": 9.0}
    cuts = [{"step": 1, "kept": 0.8}, {"step": 71, "kept": 0.6}]
    text = card_of(manifest={**MANIFEST, "cuts": cuts, "learning_rate": chosen})
    assert "tuned and pruned in one run, in 2 cuts (before step 1, 71 of 700)." in text
    assert (
        "- learning rate 0.0005: chosen on valid from 0.0005 (2.000), 0.001 (not finite) (loss after 70 steps" in text
    )


def test_card_lists_scores_with_standard_errors() -> None:
    rows = [ScoreRow("topic", "accuracy", {"tuned": (0.8, 0.02, 200), "pruned": (0.75, math.nan, 200)})]
    text = card_of(scores=rows)
    assert "| task | metric | items | dense, tuned | this model |" in text
    assert "| topic | accuracy | 200 | 0.800 ± 0.020 | 0.750 |" in text
    assert "± nan" not in text
    assert "On the run's test split, ± standard error." in text
    assert "test split, computed in bfloat16, ±" in card_of(scores=rows, manifest={**MANIFEST, "dtype": "bfloat16"})


def test_export_card_has_usage_of_the_export_and_scores_of_the_model() -> None:
    rows = [ScoreRow("topic", "accuracy", {"pruned": (0.75, 0.02, 200)})]
    text = format_export_card(card_of(scores=rows), "onnx", "onnx, float32, 0.7 MB")
    assert "This is an export: onnx, float32, 0.7 MB." in text
    assert "trust_remote_code" not in text
    assert text.count("```python") == 1
    assert "InferenceSession" in text
    assert "| topic | accuracy | 200 | 0.750 ± 0.020 |" in text
    assert front_matter(text) == front_matter(card_of())
    assert 'from_pretrained("PATH", trust_remote_code=True)' in format_export_card(text, "per-layer", "bfloat16")


def test_card_leaves_out_unknown_sections() -> None:
    config = from_mapping({"model": "a/path/of/ours", "layout": "uniform"})
    text = format_model_card(Provenance(config, Manifest.empty()), random_plan(MODEL), find_sites(MODEL))
    assert {"base_model", "license"}.isdisjoint(front_matter(text))
    assert "## Scores" not in text
    assert "## Size" not in text
    assert "the base does not name one" in text
    assert "trust_remote_code=True" not in text


def test_card_holds_names_of_others_as_text() -> None:
    name = f"task | `{ATTACK}\n\n## Forged\n"
    config = from_mapping({"model": name, "data": {"train": [name]}})
    facts = {**MANIFEST, "versions": {name: name}, "commit": name, "data": {"hashes": {name: name}}, "dtype": name}
    facts["learning_rate"] = {"chosen": 1e-3, "description": name}
    licence = LicenseInfo(name, name, name, name)
    scores = [ScoreRow(name, name, {"dense": (0.5, 0.1, 3)})]
    provenance = Provenance(config, Manifest.from_dict(facts), licence, scores, "c" * 64)
    card = format_model_card(provenance, random_plan(MODEL), find_sites(MODEL))
    assert not steering(card)
    body = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", card.split("---\n", 2)[2])
    assert "<" not in body
    assert "&lt;script&gt;" in body
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        *[line for line in card.splitlines() if line.startswith("# ")],
        "## Size", "## Scores", "## Provenance", "## Licence",
    ]  # fmt: skip
    (row,) = (line for line in card.splitlines() if "0.500 ± 0.100" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 5
    assert front_matter(card)["license"] == name


def test_rewrite_card_adds_scores_of_the_run(tmp_path: Path) -> None:
    folder, plan, sites = RunFolder(tmp_path), random_plan(MODEL), find_sites(MODEL)
    config = from_mapping({"model": "owner/name"})
    (tmp_path / "evaluation").mkdir()
    folder.model_folder.mkdir()
    folder.plan_file.write_text(plan.to_json())
    (tmp_path / "manifest.json").write_text(Manifest.from_dict(MANIFEST).to_json())
    assert card_scores(folder) == ()
    assert "## Scores" not in render_card(folder, config, plan, sites)
    for name, value in (("dense", 0.5), ("pruned", 0.7)):
        scores = {"accuracy": Score(value, 0.01, 50), "nll": Score(1.5, 0.1, 50)}
        folder.evaluation_file(name).write_text(Evaluation({"topic": TaskResult("topic", scores, ())}).to_json())
    assert [(row.task, row.metric) for row in card_scores(folder)] == [("topic", "accuracy"), ("topic", "nll")]
    text = rewrite_card(folder, config, sites).read_text()
    assert "| topic | accuracy | 50 | 0.500 ± 0.010 | 0.700 ± 0.010 |" in text


# -- the licence of the base ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# A model\n", ("apache-2.0", "", "")),
        ("---\nlicense: [mit]\ntags: [a]\n---\n", ("mit", "", "")),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n", ("other", "own", "LICENSE")),
        ("---\ntags: [a]\n---\n", ("", "", "")),
        ("---\n: : not yaml [\n---\n", ("", "", "")),
        ("---\njust text\n---\n", ("", "", "")),
        ("# no front matter\n---\nlicense: mit\n---\n", ("", "", "")),
        ("", ("", "", "")),
    ],
)
def test_read_license_reads_front_matter_of_the_card(
    content: str, expected: tuple[str, str, str], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(content)
    licence = read_license(str(tmp_path))
    assert (licence.id, licence.name, licence.link) == expected


def test_read_license_names_a_licence_file_without_front_matter(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("terms\n")
    assert read_license(str(tmp_path)) == LicenseInfo("other", where="its file LICENSE")


def test_read_license_reads_gguf_keys(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_license(str(tmp_path / "a.gguf")) == LicenseInfo("apache-2.0", where="its .gguf file")


def test_read_license_of_unreadable_base_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise MissingPackage("not there")

    monkeypatch.setattr(provenance, "demo_file", missing)
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    for name in ("demo", str(tmp_path / "torn.gguf"), str(tmp_path / "none"), "owner/never-fetched", "not a name !"):
        assert read_license(name) == LicenseInfo()


def test_card_names_all_versions_that_a_run_was_made_with() -> None:
    environments = [{"versions": {"torch": "1.0"}, "commit": "aa"}, {"versions": {"torch": "2.0"}}]
    text = card_of(manifest={**MANIFEST, "environments": environments})
    assert "- made with torch 1.0; prunetune at commit `aa`\n- resumed with torch 2.0\n" in text
