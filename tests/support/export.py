"""Helpers for tests of export: run folders with a written model, plans, and references for llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunetune import Plan, cut, find_sites
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.gguf import llamacpp
from prunetune.export.source import ExportSource
from support.models import random_plan, tiny


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int]) -> llamacpp.GreedyContinuation:
    """The result of `llamacpp.reference_continuations` for one prompt, computed in this process."""
    tokens, gaps = [], []
    for _ in range(llamacpp.STEPS):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float((best.values[0] - best.values[1]) / logits.abs().max()))
    return llamacpp.GreedyContinuation(tuple(tokens), tuple(gaps))


def reference_here(source: ExportSource, prompts: Sequence[Sequence[int]]) -> list[llamacpp.GreedyContinuation]:
    """`llamacpp.reference_continuations` in this process, as a fresh one takes seconds to start."""
    model = source.load_model()
    return [greedy(model, prompt) for prompt in prompts]


WIDE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def plan_of(model: Any, groups: int, channels: int) -> Plan:
    """A plan that keeps the last `groups` KV groups and the last `channels` MLP channels of every layer."""
    widths = {"attention": groups, "mlp": channels}
    sites = find_sites(model)
    kept = {site.name: tuple(range(site.units - widths[site.kind], site.units)) for site in sites}
    return Plan(kept, {site.name: site.units for site in sites})


def run_folder(
    path: Path,
    tokenizer: Any,
    family: str = "llama",
    *,
    layout: str = "per-layer",
    plan: Plan | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[Path, Any]:
    """Write a run folder with a pruned model; returns it, and the model in float32 with the written weights."""
    model = tiny(family, **(WIDE | changes))
    sites = find_sites(model)
    plan = plan or (plan_of(model, sites[0].units - 1, 64) if layout == "uniform" else random_plan(model))
    cut(model, plan)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text("model: somewhere\n")
    write_checkpoint(model, tokenizer, plan, sites, path / "model", layout=layout, card="")
    return path, model.float()
