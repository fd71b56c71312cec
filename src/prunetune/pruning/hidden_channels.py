"""Hidden channels: the entries of the residual stream, which embedding and layers write, and layers and head read.

One set is kept for the whole model. Which axis of which weight belongs to the stream is written down nowhere: two
models without weights are built from the configuration with different hidden sizes, and the axes that differ are those.
So a stock class opens what is left, with a smaller `hidden_size` and a `head_dim` of its own.

**Exactness.** A mask closes a channel wherever it is written. RMSNorm divides by the root of a mean over all d
channels, and in the cut model over the k that are kept, so a mask also corrects every norm to a mean over k. Then the
cut only selects: no weight changes, and epsilon, norms of heads and number formats are as before. Gemma multiplies its
embedding by the root of the hidden size, which a mask follows as well.

**The scale of norms.** Removed channels carry less than their share, so a mean over k would make every output smaller.
Before a cut, `keep_norm_scale` multiplies the weights of the norms that read the stream by sqrt(d / k), as if the mean
still ran over d. Training tunes these weights from there on.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from prunetune.errors import ConfigError
from prunetune.pruning.families import MODEL_TYPE_PREFIX, head_counts
from prunetune.pruning.linears import ROWS, stored_axis, unwrap_adapter
from prunetune.pruning.units import ALL_LAYERS, LinearSlice, ParamSlice, Site, SiteWeights, UnitKind

SITE_NAME = f"model:{UnitKind.HIDDEN_CHANNEL}"
DERIVED_HEADS = "its head dimension is the hidden size divided by the heads"
REFUSED = "budget.units: hidden-channels cannot be pruned in this model: {}; leave it out of budget.units"
SIZE_ATTRIBUTES = ("hidden_size", "hidden_dim", "embedding_dim")  # of modules whose forward reads the hidden size

# -- which weights belong to the stream --------------------------------------------------------------------------------


def stream_axes(config: Any) -> Mapping[str, int]:
    """{parameter: its axis of hidden channels} in the class of this configuration, or of the one it was pruned from.

    Raises `ConfigError` where a weight has two such axes, or no model of another hidden size can be built.
    """
    heads = head_counts(config)
    values = {name: value for name, value in config.to_dict().items() if name not in ("per_layer_config", "auto_map")}
    queries = heads.query_heads or config.num_attention_heads
    values |= {"model_type": config.model_type.removeprefix(MODEL_TYPE_PREFIX), "head_dim": heads.head_dim}
    return _stream_axes(json.dumps(values, default=str), int(queries))


@cache
def _stream_axes(values_json: str, heads: int) -> Mapping[str, int]:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values: dict[str, Any] = json.loads(values_json)
    shapes = []
    try:
        for size in (64 * heads, 128 * heads):
            config = CONFIG_MAPPING[values["model_type"]].from_dict(values | {"hidden_size": size})
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            shapes.append({name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)})
    except Exception as error:  # each class refuses in its own way
        raise ConfigError(REFUSED.format(str(error).partition("\n")[0])) from error
    axes: dict[str, int] = {}
    for name, narrow in shapes[0].items():
        differing = [axis for axis, sizes in enumerate(zip(narrow, shapes[1][name], strict=True)) if len({*sizes}) > 1]
        if len(differing) > 1:
            raise ConfigError(REFUSED.format(f"{DERIVED_HEADS} ({name})"))
        if differing:
            axes[name] = differing[0]
    return axes


def with_hidden_channels(model: Any, layer_prefixes: Sequence[str], sites: Sequence[Site]) -> tuple[Site, ...]:
    """The site of hidden channels, and then the others with their `hidden_params`; works on the meta device.

    Raises `ConfigError` where `stream_axes` does.
    """
    axes, size = stream_axes(model.config), int(model.config.hidden_size)
    named = {name.replace(".base_layer.", "."): weight for name, weight in model.named_parameters()}
    per_channel = {name: named[name].numel() // size for name in axes if name in named}  # a tied head is no second one
    inside = tuple(f"{prefix}." for prefix in layer_prefixes)
    producers, readers, params = list[LinearSlice](), list[LinearSlice](), list[ParamSlice]()
    for name in per_channel:
        path, _, leaf = name.rpartition(".")
        module = unwrap_adapter(model.get_submodule(path))
        if not isinstance(module, nn.Linear | Conv1D):
            params.append(ParamSlice(name, axes[name]))
        elif leaf == "weight":  # a bias goes with its weight's rows
            is_written = axes[name] == stored_axis(module, ROWS)
            (producers if is_written else readers).append(LinearSlice(path, (1,)))
    crossed, inside_site = dict[str, Site](), dict[str, int]()  # {site: of one channel, all that is inside}
    for site in reversed(sites):  # inner ones first
        weights, count = site.weights, 0
        if site.kind.is_whole_block:
            linears = weights.block_linears
            modules = linears if site.gated_module in linears else (site.gated_module,)
            removed = tuple(f"{name}." for name in modules)
            count = sum(number for name, number in per_channel.items() if name.startswith(removed))
            count -= inside_site.get(site.name, 0)
        else:
            count += sum(rows.rows_per_unit for rows in weights.producers if f"{rows.module}.weight" in axes)
            if weights.consumer and not weights.consumer_is_childs and f"{weights.consumer.module}.weight" in axes:
                count += weights.consumer.rows_per_unit
            count += sum(per_channel.get(param.parameter, 0) // site.units for param in weights.params)
        crossed[site.name] = replace(site, hidden_params=count)
        of_all = site.units * count + inside_site.get(site.name, 0)
        inside_site[site.parent] = inside_site.get(site.parent, 0) + of_all
    owned = inside_site.get("", 0)
    in_layers = sum(number for name, number in per_channel.items() if name.startswith(inside))
    hidden = Site(
        name=SITE_NAME,
        layer=ALL_LAYERS,
        kind=UnitKind.HIDDEN_CHANNEL,
        units=size,
        unit_params=in_layers - owned,
        weights=SiteWeights(producers=tuple(producers), readers=tuple(readers), params=tuple(params)),
        gating="hidden",
        child_params=owned,
        outer_params=sum(per_channel.values()) - in_layers,
    )
    return (hidden, *(crossed[site.name] for site in sites))


# -- the mask ----------------------------------------------------------------------------------------------------------


def gate_hidden(model: Any, site: Site, gate: Tensor) -> list[RemovableHandle]:
    """Close channels at everything that writes them, and let norms divide by a mean over the open ones."""
    open_channels = gate.detach().sum()
    embedding = model.get_input_embeddings()
    # Of Gemma: what its class would multiply the embedding by, over what it does.
    rescale = (open_channels / site.units).sqrt() if _scale_follows_size(embedding, site.units) else None

    def close(_: nn.Module, __: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        closed = first * gate.to(first.dtype)
        return (closed, *output[1:]) if isinstance(output, tuple) else closed

    def close_embedding(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        factor = gate if rescale is None else gate * rescale
        return output * factor.to(output.dtype)

    def correct(norm: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> Tensor:
        states = (inputs[0] if inputs else options["hidden_states"]).float()
        square, epsilon = states.square().mean(-1, keepdim=True), norm_epsilon(norm)
        factor: Tensor = ((square + epsilon) / (square * site.units / open_channels + epsilon)).sqrt()
        return output * factor.to(output.dtype)

    handles = [embedding.register_forward_hook(close_embedding)]
    for writer in site.producers:
        handles.append(model.get_submodule(writer.module).register_forward_hook(close))
    for path in dict.fromkeys(param.parameter.rpartition(".")[0] for param in site.weights.params):
        module = model.get_submodule(path)
        if is_norm(module):
            handles.append(module.register_forward_hook(correct, with_kwargs=True))
        elif hasattr(module, "down_proj"):  # fused experts
            handles.append(module.register_forward_hook(close))
    return handles


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation, by the name of its class."""
    return "Norm" in type(module).__name__


def norm_epsilon(norm: Any) -> float:
    """What an RMSNorm adds to the mean square; 0 where it does not say."""
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)


def _scale_follows_size(embedding: Any, size: int) -> bool:
    scale = getattr(embedding, "scalar_embed_scale", None)
    return scale is not None and math.isclose(scale, size**0.5)


# -- the cut -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def keep_norm_scale(model: Any, site: Site, kept: int) -> None:
    """Multiply what the norms that read the stream put out by sqrt(d / k), in place, and let their weights be tuned.

    To be called before the cut to `kept` of the site's channels. The weights become float32. Norms after a block of
    Gemma, whose embedding shrinks by sqrt(k / d), put out as much less already.
    """
    if kept == site.units:
        return
    factor = (site.units / kept) ** 0.5
    shrinks = _scale_follows_size(model.get_input_embeddings(), site.units)
    for param in site.weights.params:
        path, _, leaf = param.parameter.rpartition(".")
        norm: Any = model.get_submodule(path)
        if not is_norm(norm):
            continue
        weight = getattr(norm, leaf).detach().to(torch.float32, copy=True)
        parent, _, name = path.rpartition(".")
        is_after_block = name.startswith("post_") and hasattr(model.get_submodule(parent), "pre_feedforward_layernorm")
        if not (shrinks and is_after_block):
            offset = _weight_offset(norm)
            weight = (weight + offset) * factor - offset
        setattr(norm, leaf, nn.Parameter(weight))


def _weight_offset(norm: Any) -> float:
    """1 where a norm multiplies by one plus its weight, else 0: what it makes of ones with a weight of zeros."""
    weight = norm.weight
    norm.weight = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    output = norm(torch.ones(1, 1, len(weight), device=weight.device))
    norm.weight = weight
    return float(bool(output.abs().sum() > 0))


def set_hidden_size(model: Any, site: Site, kept: Sequence[int]) -> None:
    """After the cut of the weights: tie the head again, and state the new size in modules and configuration."""
    dense, size, config = site.units, len(kept), model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # The stream's scale over that of the dense model, which is a teacher's.
    model.dense_hidden_size, model.stream_scale = getattr(model, "dense_hidden_size", dense), 1.0
    if _scale_follows_size(embedding, dense):
        model.stream_scale = (size / model.dense_hidden_size) ** 0.5
        embedding.scalar_embed_scale = size**0.5
        embedding.embed_scale = torch.full_like(embedding.embed_scale, size**0.5)
    if head is not None and head.weight.shape[-1] == dense:
        head.weight = embedding.weight
    if isinstance(head, nn.Linear):
        head.in_features = size
    for module in model.modules():
        for name in SIZE_ATTRIBUTES:
            if vars(module).get(name) == dense:
                setattr(module, name, size)
        if isinstance(module, nn.RMSNorm) and module.normalized_shape == (dense,):
            module.normalized_shape = (size,)
    config.head_dim = head_counts(config).head_dim
    config.hidden_size = size
    index = torch.tensor(kept, device=embedding.weight.device)
    before = getattr(model, "kept_hidden_channels", None)
    model.kept_hidden_channels = index if before is None else before[index]  # by which a dense teacher is compared
