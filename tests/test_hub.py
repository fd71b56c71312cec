"""After `hub.register()` a per-layer folder opens without a trust flag, and the folder's own code is not run."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunetune import Plan, cut, find_sites, hub
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.selfcheck import compute_logits
from prunetune.model.per_layer_classes import per_layer_classes
from prunetune.pruning.units import DEFAULT_UNITS
from support.data import subwords
from support.models import random_plan, relative, tiny, tokens

# Name of the folder -> family, and the kinds of unit that were pruned.
CASES = {
    **{
        name: (name, DEFAULT_UNITS)
        for name in ("llama", "qwen2", "gemma3_text", "phi3", "opt", "gpt_neox", "bloom", "cohere2")
    },
    "llama-heads": ("llama", ("kv-groups", "query-heads", "mlp-channels")),
    "llama-blocks": ("llama", ("attention-blocks", "mlp-blocks", "mlp-channels")),
    "llama-mlp": ("llama", ("mlp-channels",)),
    "gpt2": ("gpt2", DEFAULT_UNITS),
    "qwen3_moe": ("qwen3_moe", ("kv-groups", "experts", "expert-channels")),
}

# Registering is for the whole process, so it happens in one of its own.
READER = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from prunetune import hub
hub.register()
hub.register()
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__ == "prunetune.model.per_layer_classes", type(model)
    assert not any("transformers_modules" in name for name in sys.modules)
    tokens = load_file(folder / "tokens.st")["tokens"]
    save_file({"logits": model(tokens).logits.contiguous()}, folder / "logits.st")
    base = AutoModel.from_pretrained(folder).eval()
    assert type(base).__name__ == "Pruned" + type(base).__bases__[0].__name__
    AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again").eval()
    assert (again(tokens).logits - model(tokens).logits).abs().max() == 0
"""


def test_every_family_opens_without_running_its_own_code(tmp_path: Path) -> None:
    expected = {}
    for name, (family, units) in CASES.items():
        model = tiny(family)
        sites, plan = find_sites(model, units), random_plan(model, units=units)
        if name == "llama":  # a layer without attention
            plan = Plan({**plan.kept, "model.layers.1.self_attn": ()}, plan.units)
        cut(model, plan, sites=sites)
        write_checkpoint(model, subwords(), plan, sites, tmp_path / name, layout="per-layer", card="")
        for file in (tmp_path / name).glob("*.py"):
            file.write_text("raise SystemExit('this must not run')\n")
        save_file({"tokens": tokens()}, tmp_path / name / "tokens.st")
        expected[name] = compute_logits(model, tokens())
    ran = subprocess.run(
        [sys.executable, "-c", READER, *(str(tmp_path / name) for name in CASES)],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name in CASES:
        logits = load_file(tmp_path / name / "logits.st")["logits"]
        assert relative(logits, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_registered_class_has_the_widths_of_the_configuration(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    sites, plan = find_sites(model), random_plan(model)
    cut(model, plan)
    write_checkpoint(model, subwords(), plan, sites, tmp_path / "model", layout="per-layer", card="")
    config_class, base, causal = per_layer_classes(family)
    config = config_class.from_pretrained(tmp_path / "model")
    with torch.device("meta"):
        registered = causal(config)
        assert {name: p.shape for name, p in base(config).named_parameters()}
    shapes = {name: parameter.shape for name, parameter in registered.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}


def test_vllm_finds_register_as_a_plugin() -> None:
    assert not per_layer_classes("llama")[1].__init__.__annotations__
    (point,) = (p for p in entry_points(group="vllm.general_plugins") if p.name == "prunetune")
    assert point.load() is hub.register
