"""Head counts that a family's configuration, or a runtime's reading of it, cannot express."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prunetune import cut, export_run, find_sites
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.gguf import llamacpp
from prunetune.export.result import ExportOptions
from prunetune.export.selfcheck import compute_logits
from prunetune.export.source import ExportSource
from support.data import subwords
from support.export import plan_of, reference_here, run_folder
from support.models import relative, tiny

SMALL = {"vocab_size": 320, "intermediate_size": 96, "layers": 2}
# A hidden size of 2,048 and 32 heads of 64, of which 24 stay: Llama 3.2 1B's attention. Qwen2's 0.5B has 14 heads.
TRAPS: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "llama": ({"hidden_size": 2048, "groups": 8, "ratio": 4, "head_dim": 64}, 6, "MistralForCausalLM", "llama"),
    "qwen2": ({"hidden_size": 896, "groups": 2, "ratio": 7, "head_dim": 64}, 1, "SeedOssForCausalLM", "seed_oss"),
}


@pytest.mark.parametrize("family", TRAPS)
def test_pruned_heads_are_written_as_an_equivalent_family(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both transformers and llama.cpp read the equivalent family."""
    monkeypatch.setattr(llamacpp, "reference_continuations", reference_here)
    sizes, groups, written, arch = TRAPS[family]
    plan = plan_of(tiny(family, **(SMALL | sizes)), groups, 64)
    run, model = run_folder(tmp_path / "run", subwords(), family, layout="uniform", plan=plan, **(SMALL | sizes))
    source = ExportSource.open(run)
    config = json.loads((source.folder / "config.json").read_text())
    assert config["architectures"] == [written]
    assert config["num_attention_heads"] == groups * sizes["ratio"]
    ids = torch.arange(32)[None]
    assert relative(compute_logits(source.load_model(), ids), compute_logits(model, ids)) <= 1e-5
    result = export_run(run, "gguf", options=ExportOptions(dtype="f32"))
    assert result.format == f"GGUF, architecture {arch}"


def test_qwen2_with_all_heads_stays_qwen2(tmp_path: Path) -> None:
    sizes = SMALL | TRAPS["qwen2"][0]
    plan = plan_of(tiny("qwen2", **sizes), 2, 64)
    run, _ = run_folder(tmp_path / "run", subwords(), "qwen2", layout="uniform", plan=plan, **sizes)
    assert ExportSource.open(run).config.model_type == "qwen2"


def test_written_checkpoint_explains_another_class(tmp_path: Path) -> None:
    sizes = SMALL | TRAPS["qwen2"][0]
    model = tiny("qwen2", **sizes)
    sites, plan = find_sites(model), plan_of(model, 1, 96)
    written = write_checkpoint(cut(model, plan), subwords(), plan, sites, tmp_path / "model", layout="uniform", card="")
    assert written.note == (
        "written as SeedOssForCausalLM: Qwen2Config means heads of 896 / 7 in vLLM, llama.cpp and mlx-lm, and these "
        "have 64 rows; tensors and arithmetic are the same"
    )
