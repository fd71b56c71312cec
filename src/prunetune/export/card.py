"""The model card that goes with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunetune.config import RunConfig
from prunetune.model.units import Site, kept_params, layout_of
from prunetune.plan import Plan

OWN_CODE = """`trust_remote_code` runs `configuration_pruned.py` and `modeling_pruned.py` of this folder.
They give each layer its own widths; read them first. A model of `layout: uniform` needs none."""


WORDS = {
    "layers": "layer",
    "attention-blocks": "attention block",
    "attention": "attention",
    "query-heads": "query head",
    "mlp-blocks": "MLP block",
    "mlp": "MLP",
    "experts": "expert",
    "expert-channels": "expert channel",
}


def card_of(config: RunConfig, manifest: dict[str, Any], plan: Plan, sites: Sequence[Site]) -> str:
    """README.md of the model folder: where it comes from, what was removed, how to open it."""
    share = kept_params(sites, plan) / sum(site.params for site in sites)
    kinds = {site.kind for site in sites}  # others stay whole
    blocks = " and ".join(name for kind, name in WORDS.items() if kind in kinds)
    hashes = "\n".join(f"- {split}: `{digest}`" for split, digest in manifest.get("data", {}).get("hashes", {}).items())
    code = ", trust_remote_code=True" if layout_of(config.layout, sites) == "per-layer" else ""
    warning = f"\n{OWN_CODE}\n" if code else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [prunetune, pruning, lora]
---
# {config.model}, tuned and pruned

Made by prunetune from `{config.model}`: LoRA tuning and structural pruning in one run.
{100 * share:.1f}% of the {blocks} parameters remain (layout {config.layout});
`plan.json` names the units kept.
The licence of the base model applies.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{code})
tokenizer = AutoTokenizer.from_pretrained("PATH"{code})
```
{warning}
SHA-256 of the data:

{hashes}
"""
