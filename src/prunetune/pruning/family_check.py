"""Architectures without an entry: what belongs together by configuration and names, if a small random model agrees.

A kind of unit counts as prunable where a small model of the configuration, masked, equals the same model cut. So a
coupling that is read wrongly is refused, and never cut.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunetune.errors import UnknownArchitecture
from prunetune.plan import Plan
from prunetune.pruning.cut import cut_linears, remove_layers
from prunetune.pruning.families import (
    Family,
    MixtureOfExperts,
    architecture_info,
    is_of_heads,
    layer_prefixes,
    plan_inside_layers,
)
from prunetune.pruning.masking import masked
from prunetune.pruning.sites import find_sites
from prunetune.pruning.tiny_models import tiny_config, tiny_model
from prunetune.pruning.units import KIND_BY_NAME, Site, UnitKind
from prunetune.utils.failures import first_line

TOLERANCE = 1e-5  # largest difference of logits over their largest magnitude, float32
PARTS_OF_BLOCKS = (UnitKind.KV_GROUP, UnitKind.MLP_CHANNEL, UnitKind.EXPERT, UnitKind.EXPERT_CHANNEL)
# Names that linears of a block have in most classes of transformers, for blocks that the plan leaves out.
PRODUCERS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj",
    "gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "fc_in", "input_linear",
)  # fmt: skip
CONSUMERS = ("o_proj", "out_proj", "dense", "down_proj", "w2", "fc2", "fc_out", "output_linear")

_families: dict[str, Family | UnknownArchitecture] = {}  # by the small configuration, as JSON
_candidates: dict[str, Family] = {}  # of architectures under check


def checked_family(config: Any) -> Family:
    """What a small model of this configuration shows to hold; raises `UnknownArchitecture` where no unit can be cut."""
    if candidate := _candidates.get(config.model_type):
        return candidate
    try:
        small = tiny_config(config)
        key = small.to_json_string(use_diff=False)
    except Exception as error:  # each class refuses in its own way
        raise _refusal(config, f"a small one of its configuration cannot be made ({first_line(error)})") from error
    if key not in _families:
        try:
            _families[key] = _check(small)
        except UnknownArchitecture as refusal:
            _families[key] = refusal
    family = _families[key]
    if isinstance(family, UnknownArchitecture):
        raise UnknownArchitecture(str(family))
    return family


def _refusal(config: Any, reason: str) -> UnknownArchitecture:
    return UnknownArchitecture(
        f"architecture {config.model_type!r} has no entry in families.py, and {reason}; docs/extend/family.md says "
        "what an entry takes"
    )


def _check(config: Any) -> Family:
    """The family of a small configuration, with the kinds that do not hold as unprunable."""
    try:
        model = tiny_model(config)
        small_logits(model)
        family = read_family(model)
    except Exception as error:  # each class refuses in its own way
        raise _refusal(config, f"a small one of its configuration does not run ({first_line(error)})") from error
    _candidates[config.model_type] = family
    try:
        for name, kind in KIND_BY_NAME.items():
            known = architecture_info(model).unprunable
            if kind not in known and (reason := _difference(config, (name,))):
                family = replace(family, unprunable={**family.unprunable, kind: reason})
                _candidates[config.model_type] = family
        unprunable = architecture_info(model).unprunable
        held = [name for name, kind in KIND_BY_NAME.items() if kind not in unprunable]
        if not any(KIND_BY_NAME[name] in PARTS_OF_BLOCKS for name in held):
            reasons = dict.fromkeys(unprunable[kind] for kind in PARTS_OF_BLOCKS[:2])
            raise _refusal(config, f"nothing of it can be cut: {'; '.join(reasons)}")
        if reason := _difference(config, held):
            raise _refusal(config, reason)
    finally:
        del _candidates[config.model_type]
    return family


def _difference(config: Any, units: Collection[str]) -> str:
    """Why these kinds of units cannot be cut in a model of this small configuration; "" where masked equals cut."""
    from transformers import AutoModelForCausalLM

    try:
        model = tiny_model(config)
        sites = find_sites(model, units)
        plan = half_plan(sites)
        with masked(model, plan, sites=sites):
            expected = small_logits(model)
        dense = small_logits(model)
        cut_linears(model, plan, sites=sites)
        results = [small_logits(model)]
        remove_layers(model, plan, sites)
        results.append(small_logits(model))
        if {site.kind for site in sites} == {UnitKind.LAYER}:
            with torch.device("meta"):
                rebuilt = AutoModelForCausalLM.from_config(model.config, trust_remote_code=False)
            if dict(model.named_parameters()).keys() != dict(rebuilt.named_parameters()).keys():
                return "its configuration ties layers to their index"
    except Exception as error:  # each class fails in its own way
        return f"a small model of its configuration does not run after a cut ({first_line(error)})"
    scale = float(expected.abs().max())
    if not torch.isfinite(expected).all() or float((dense - expected).abs().max()) < 1e-4 * scale:
        return "masks make no difference in a small model of its configuration"
    if max(float((result - expected).abs().max()) for result in results) > TOLERANCE * scale:
        return "a small model of its configuration computes something else cut than masked"
    return ""


def half_plan(sites: Collection[Site]) -> Plan:
    """A plan that keeps half of all units, others in each layer, and every other block or layer where it may."""
    kept: dict[str, tuple[int, ...]] = {}
    by_name, blocks = {site.name: site for site in sites}, 0
    for place, site in enumerate(sites):
        parent = by_name.get(site.parent)
        groups = site.open_parent_groups(kept[parent.name] if parent else None, parent.units if parent else 1)
        size, count = site.units_per_group, max(site.min_units_per_group, site.units_per_group // 2)
        if site.kind.is_whole_block and not site.min_units_per_group:
            count, blocks = blocks % 2, blocks + 1
        offset = place % (size - count + 1)
        kept[site.name] = tuple(group * size + unit for group in groups for unit in range(offset, offset + count))
    return Plan(kept, {site.name: site.units for site in sites})


def small_logits(model: Any) -> Tensor:
    """[2, 12, vocabulary] of a fixed text, without a cache."""
    tokens = torch.arange(24).view(2, 12) * 5 % 113 + 3
    with torch.no_grad():
        logits: Tensor = model(tokens.clamp(max=model.config.vocab_size - 1), use_cache=False).logits
    return logits


def read_family(model: Any) -> Family:
    """What configuration, names and shapes of a small model say, which is not checked yet."""
    layers = [dict(model.get_submodule(prefix).named_modules()) for prefix in layer_prefixes(model)]
    linears = {name: module for layer in layers for name, module in layer.items() if isinstance(module, nn.Linear)}
    stated = {name: style for name, style in plan_inside_layers(model.config).items() if name in linears}
    plan, unprunable, mlp_width = dict[str, str](), dict[UnitKind, str](), 0
    for kind, units in ((UnitKind.KV_GROUP, "heads"), (UnitKind.MLP_CHANNEL, "channels")):
        block = {name: style for name, style in stated.items() if is_of_heads(name) is kind.is_head}
        if not any(style.startswith("rowwise") for style in block.values()):
            block = _named_block(linears, kind.is_head)
        consumers = [name for name, style in block.items() if style.startswith("rowwise")]
        if not consumers:
            unprunable[kind] = f"no linears of its layers are named as those of {units} are"
        elif kind is UnitKind.MLP_CHANNEL:
            mlp_width = linears[consumers[-1]].in_features
        plan |= block
    has_sinks = any(hasattr(layer.get("self_attn"), "sinks") for layer in layers)
    return Family(
        tp_plan=plan,
        intermediate_size_key=_width_option(model.config, mlp_width),
        unprunable=unprunable,
        mixture=_read_mixture(model.config, layers),
        attention_sinks="self_attn.sinks" if has_sinks else "",
    )


def _named_block(linears: Collection[str], is_head: bool) -> dict[str, str]:
    """The linears of the one block whose consumer and producers have customary names."""
    for consumer in sorted(linears, key=lambda name: ("self_attn" not in name, name)):
        start, leaf = consumer[: consumer.rfind(".") + 1], consumer.rpartition(".")[2]
        names = [start + name for name in PRODUCERS if is_of_heads(start + name) is is_head]
        producers = [name for name in names if name in linears]
        if leaf in CONSUMERS and is_of_heads(consumer) is is_head and producers and consumer.count(".") <= 1:
            return dict.fromkeys(producers, "colwise") | {consumer: "rowwise"}
    return {}


def _width_option(config: Any, width: int) -> str:
    """The configuration's option for channels that has this value; "" where there is none."""
    keys = (key for key, value in config.to_dict().items() if value == width and ("inter" in key or "ff" in key))
    return next(keys, "")


def _read_mixture(config: Any, layers: Collection[dict[str, nn.Module]]) -> MixtureOfExperts | None:
    """Fused experts with gate and up in one parameter, and the router beside them."""
    modules = {name: module for layer in layers for name, module in layer.items()}
    for name, module in modules.items():
        fused = dict(module.named_parameters(recurse=False))
        if not {"gate_up_proj", "down_proj"} <= set(fused) or fused["down_proj"].dim() != 3:
            continue
        experts, rows, columns = fused["down_proj"].shape
        block, transposed = name.rpartition(".")[0], columns == config.hidden_size
        routers = [
            other
            for other, router in modules.items()
            if other.rpartition(".")[0] == block
            and other != name
            and any(len(weight) == experts for weight in router.parameters(recurse=False))
        ]
        return MixtureOfExperts(
            router=routers[0] if routers else f"{block}.gate",
            intermediate_size_key=_width_option(config, rows if transposed else columns),
            transposed=transposed,
            block=block,
            experts=name,
        )
    return None
