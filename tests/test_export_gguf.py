"""Laws of GGUF: the file says what the model in memory says (in llama.cpp where it is there), or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from data_helpers import subwords
from export_helpers import WIDE, plan_of, run_folder
from model_helpers import random_plan, tiny
from prunetune import Plan, export_run
from prunetune.errors import ModelError, SelfCheckFailed
from prunetune.export.gguf import llamacpp, tensors
from prunetune.export.gguf.architectures import UNIFORM, architecture_of
from prunetune.export.gguf.write import read_back, write
from prunetune.export.result import ExportOptions
from prunetune.export.source import Source

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name -> family, layout, what its configuration has beside the rest, the architecture that is expected
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("llama", "uniform", {}, "llama"),
    "llama with biases": ("llama", "uniform", {"attention_bias": True, "mlp_bias": True}, "llama"),
    "llama 3": ("llama", "uniform", {"rope_parameters": LLAMA3}, "llama"),
    "llama, linear": ("llama", "uniform", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "llama"),
    "qwen2, heads": ("qwen2", "uniform", {}, "seed_oss"),
    "qwen2, channels": ("qwen2", "uniform", {"keep": 2, "head_dim": 16}, "qwen2"),
    "qwen3": ("qwen3", "uniform", {}, "qwen3"),
    "qwen3, yarn": ("qwen3", "uniform", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "qwen3"),
    "gemma": ("gemma", "uniform", {"tie_word_embeddings": True}, "gemma"),
    "gemma 2": ("gemma2", "uniform", {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}, "gemma2"),
    "gemma 3": ("gemma3_text", "uniform", {"query_pre_attn_scalar": 16}, "gemma3"),
    "phi 3": ("phi3", "uniform", {"keep": 2}, "phi3"),
    "smollm3": ("smollm3", "uniform", {"layers": 5}, "smollm3"),
    "granite": ("granite", "uniform", {"embedding_multiplier": 12, "residual_multiplier": 0.2}, "granite"),
    "llama, layers": ("llama", "per-layer", {}, "deci"),
    "llama 3, layers": ("llama", "per-layer", {"rope_parameters": LLAMA3}, "deci"),
    "mistral, layers": ("mistral", "per-layer", {"sliding_window": None}, "deci"),
    "qwen2, layers": ("qwen2", "per-layer", {}, "deci"),
    "qwen3, layers": ("qwen3", "per-layer", {"tie_word_embeddings": True}, "openelm"),
}


def made(case: str, folder: Path) -> tuple[Path, Any]:
    """The run's folder, and the model in memory."""
    family, layout, changes, _ = CASES[case]
    changes = {"rope_theta": 5e4, "original_max_position_embeddings": 32} | dict(changes)
    rope = changes.pop("rope_parameters", None)
    theta, context = changes.pop("rope_theta"), changes.pop("original_max_position_embeddings")
    if rope:
        changes["rope_parameters"] = {"rope_theta": theta, "original_max_position_embeddings": context, **rope}
    keep = changes.pop("keep", 1)
    plan = plan_of(tiny(family, **(WIDE | changes)), keep, 64) if layout == "uniform" else None
    return run_folder(folder, subwords(), family, layout=layout, plan=plan, **changes)


def greedy(model: Any, prompt: list[int]) -> llamacpp.Answer:
    """As the reference in its own process does it."""
    tokens, gaps = [], []
    for _ in range(llamacpp.STEPS):
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float((best.values[0] - best.values[1]) / logits.abs().max()))
    return llamacpp.Answer(tuple(tokens), tuple(gaps))


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_says_what_the_model_says(case: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="pip install 'prunetune[llamacpp]'")
    run, model = made(case, tmp_path / "run")
    source = Source.open(run)
    assert architecture_of(source).name == CASES[case][3]
    for dtype in ("f32", "f16"):
        file = tmp_path / f"{dtype}.gguf"
        tensors_written, tokenizer = write(source, file, dtype)
        read_back(source, file, tensors_written)
        assert "pre-tokenizer gpt-2" in tokenizer
        prompts = llamacpp.prompts_of(source)
        found = llamacpp.agreement(file, source, prompts, [greedy(model, prompt) for prompt in prompts], threads=1)
        assert found.holds, str(found)
        assert found.texts == len(llamacpp.TEXTS)
