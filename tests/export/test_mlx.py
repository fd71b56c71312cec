"""An export for mlx-lm: a per-layer model as OpenELM, whose arithmetic in torch gives the model's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from prunetune import Plan, export_run
from prunetune.errors import ConfigError, ModelError
from prunetune.export import mlx
from prunetune.export.result import ExportOptions
from prunetune.model.loading import load_config
from support.data import subwords
from support.export import WIDE, run_folder
from support.models import random_plan, relative, tiny

IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture(autouse=True)
def _without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mlx-lm is installed, the export asks it in a fresh process; that is measured by benchmarks/formats.py."""
    monkeypatch.setattr(mlx, "is_installed", lambda _: False)


def openelm_logits(folder: Path, ids: Tensor) -> Tensor:
    """OpenELM as mlx_lm/models/openelm.py computes it: ids [B, T] -> logits [B, T, V]."""
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    size, eps = config["head_dim"], config["rms_norm_eps"]
    angles = torch.arange(ids.shape[1])[:, None] / config["rope_freq_constant"] ** (torch.arange(0, size, 2) / size)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def norm(x: Tensor, name: str) -> Tensor:
        return rms_norm(x, (x.shape[-1],), weights[f"{name}.weight"], eps)

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sin

    h = weights["transformer.token_embeddings.weight"][ids]
    for index in range(config["num_transformer_layers"]):
        name = f"transformer.layers.{index}"
        heads, groups = config["num_query_heads"][index], config["num_kv_heads"][index]
        width = round(config["ffn_multipliers"][index] * config["model_dim"])
        qkv = linear(norm(h, f"{name}.attn_norm"), weights[f"{name}.attn.qkv_proj.weight"])
        q, k, v = qkv.unflatten(-1, (-1, size)).transpose(1, 2).split([heads, groups, groups], 1)
        if config["normalize_qk_projections"]:
            q, k = norm(q, f"{name}.attn.q_norm"), norm(k, f"{name}.attn.k_norm")
        attended = scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        h = h + linear(attended.transpose(1, 2).flatten(2), weights[f"{name}.attn.out_proj.weight"])
        gate, up = linear(norm(h, f"{name}.ffn_norm"), weights[f"{name}.ffn.proj_1.weight"]).split(width, -1)
        h = h + linear(silu(gate) * up, weights[f"{name}.ffn.proj_2.weight"])
    head = "transformer.token_embeddings" if config["share_input_output_layers"] else "lm_head"
    return linear(norm(h, "transformer.norm"), weights[f"{head}.weight"])


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen3", True)])
def test_openelm_has_the_logits_of_the_per_layer_model(family: str, tied: bool, tmp_path: Path) -> None:
    run, model = run_folder(tmp_path / "run", subwords(), family, tie_word_embeddings=tied)
    result = export_run(run, "mlx")
    with torch.inference_mode():
        assert relative(openelm_logits(result.path, IDS), model(IDS).logits) <= 1e-5
    assert result.commands == (f"mlx_lm.chat --model {result.path}",)
    assert not result.checks[-1].ran
    assert (result.path / "tokenizer.json").is_file()
    with pytest.raises(ModelError, match=r"'openelm' .* run mlx_lm.server --model .*, and name its address"):
        load_config(str(result.path))


def test_uniform_model_keeps_its_class(tmp_path: Path) -> None:
    run, _ = run_folder(tmp_path / "run", subwords(), layout="uniform")
    result = export_run(run, "mlx", options=ExportOptions(dtype="f16"))
    assert (result.format, result.dtype) == ("LlamaForCausalLM", "float16")


def without_attention(model: Any) -> Plan:
    plan = random_plan(model)
    return Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {}, "it has no sliding windows"),
        ("qwen2", {}, "its layers are not those of qwen2"),
        ("llama", {"attention_bias": True}, "it has no bias at"),
        ("llama", {"plan": "without attention"}, "layer 1 has no attention"),
    ],
)
def test_model_that_openelm_cannot_hold_is_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    plan = without_attention(tiny(family, **WIDE)) if changes.pop("plan", "") else None
    run, _ = run_folder(tmp_path / "run", subwords(), family, plan=plan, **changes)
    with pytest.raises(ModelError, match=f"{reason}.*run again with --layout uniform"):
        export_run(run, "mlx")
    assert not list((run / "exports").glob("*"))
    with pytest.raises(ConfigError, match="--pad makes layers of one width"):
        export_run(run, "mlx", options=ExportOptions(pad=True))
