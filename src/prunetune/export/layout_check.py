"""Whether a layout carries what a run will cut, tried on a small model of the same configuration before training."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prunetune.errors import ConfigError, PrunetuneError
from prunetune.export.checkpoint import write_checkpoint
from prunetune.export.stock_config import kv_groups_validator
from prunetune.model.loading import quiet_transformers
from prunetune.model.per_layer_classes import register_family
from prunetune.plan import Plan
from prunetune.pruning.cut import cut
from prunetune.pruning.families import FAMILIES, INSIDE_WRAPPERS, MODEL_TYPE_PREFIX, head_counts
from prunetune.pruning.family_check import TOLERANCE, half_plan, small_logits
from prunetune.pruning.sites import find_sites
from prunetune.pruning.tiny_models import tiny_config, tiny_model
from prunetune.pruning.units import UnitKind
from prunetune.utils.failures import first_line


def check_layout(config: Any, units: Collection[str], layout: str) -> None:
    """Raises `ConfigError` where a small model of this configuration, cut and built again in the layout, is another.

    Architectures with an entry in `FAMILIES` are not tried: the tests hold them.
    """
    config = config.get_text_config()
    is_result = config.model_type.startswith(MODEL_TYPE_PREFIX)  # of an earlier run, that has been tried
    if is_result or config.model_type in FAMILIES or config.model_type in INSIDE_WRAPPERS:
        return
    from transformers import AutoModelForCausalLM

    small = tiny_config(config)
    heads = head_counts(small)
    try:
        model = tiny_model(small)
        sites = find_sites(model, units)
        plan = half_plan(sites)
        if layout == "uniform" and not kv_groups_validator(small)(heads.kv_heads // 2):
            kept = {site.name: tuple(range(site.units)) for site in sites if site.kind is UnitKind.KV_GROUP}
            plan = Plan(dict(plan.kept) | kept, plan.units)
        expected = small_logits(cut(model, plan, sites=sites))
        register_family(small.model_type)
        no_tokenizer = SimpleNamespace(save_pretrained=lambda folder: None, eos_token_id=None)
        with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
            folder = Path(scratch) / "model"
            write_checkpoint(model, no_tokenizer, plan, sites, folder, layout=layout, card="")
            opened = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False).eval()
        difference = float((small_logits(opened) - expected).abs().max() / expected.abs().max())
    except PrunetuneError:
        raise
    except Exception as error:  # each class fails in its own way
        raise _refusal(config, layout, units, first_line(error)) from error
    if not difference <= TOLERANCE:
        raise _refusal(config, layout, units, f"it differs by {difference:.1e}")


def _refusal(config: Any, layout: str, units: Collection[str], reason: str) -> ConfigError:
    other = "per-layer" if layout == "uniform" else "uniform"
    return ConfigError(
        f"layout {layout} cannot hold {', '.join(units)} of {config.model_type!r}, as a small model built again shows "
        f"({reason}): use --layout {other}, or other budget.units"
    )
