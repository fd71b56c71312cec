"""Per-layer checkpoints without `trust_remote_code`: their classes, made by the installed package.

A per-layer folder carries two generated modules, which only run where they are trusted. After `register()`,
transformers takes this package's classes for such a folder instead and leaves its modules alone; vLLM calls `register`
by itself, through the entry point `vllm.general_plugins`. The code of a model is generated again from its
configuration, by the same templates, so that both ways build the same model.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from prunetune.export.per_layer import MODEL_TYPE_PREFIX, PerLayerNames
from prunetune.export.per_layer_code import generate_code
from prunetune.export.per_layer_templates import CONFIGURATION_TEMPLATE
from prunetune.export.stock_config import build_meta_model
from prunetune.pruning.families import FAMILIES, architecture_info
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import KIND_BY_NAME

VLLM_BACKEND_MODULE = (
    "vllm.model_executor.models.transformers:"  # its backend for models that it has no code of its own for
)
PER_LAYER_CONFIG_KEYS = ("per_layer_config", "auto_map", "architectures", "model_type", "transformers_version")


def register() -> None:
    """Tell transformers, and vLLM where it is installed, the per-layer classes of every family; again does no harm."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

    for family in FAMILIES:
        if family not in CONFIG_MAPPING:  # of a later transformers
            continue
        config, base, causal = per_layer_classes(family)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        if "vllm" in sys.modules or find_spec("vllm"):
            _register_with_vllm(family, causal.__name__)


def _register_with_vllm(family: str, name: str) -> None:
    from vllm import ModelRegistry

    backend = "TransformersMoEForCausalLM" if FAMILIES[family].mixture else "TransformersForCausalLM"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, VLLM_BACKEND_MODULE + backend)


@cache
def per_layer_classes(family: str) -> tuple[Any, Any, Any]:
    """Configuration, base model and causal model of a family's per-layer checkpoints."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    dense: Any = CONFIG_MAPPING[family]
    name = f"Pruned{dense.__name__}"
    text = CONFIGURATION_TEMPLATE.substitute(
        config=dense.__name__,
        pruned_config=name,
        model_type=MODEL_TYPE_PREFIX + family,
        digest="registered by prunetune",
    )
    config = _exec_source(text, __name__)[name]
    base = getattr(transformers, MODEL_MAPPING_NAMES[family])
    causal = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    made = (config, _resizing_class(base, config), _resizing_class(causal, config))
    for new in made:
        setattr(sys.modules[__name__], new.__name__, new)  # where pickle looks for them
    return made


def _resizing_class(stock: Any, config_class: Any) -> Any:
    """A subclass that is built dense and then takes the widths of its configuration."""

    def init(self: Any, config: Any) -> None:
        names, code = _generated_code(config)
        stock.__init__(self, code["dense"](config))
        base = getattr(self, names.base_attribute, self)
        code["resize"](self, base.get_submodule(names.layers_path), config)

    init.__annotations__.clear()  # vLLM holds arguments against annotations, which have to be classes then
    members = {"config_class": config_class, "__init__": init, "__module__": __name__}
    return type(f"Pruned{stock.__name__}", (stock,), members)


def _generated_code(config: Any) -> tuple[PerLayerNames, dict[str, Any]]:
    """What the modules beside a checkpoint of this configuration define."""
    from transformers import CONFIG_MAPPING

    family = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    values = {key: value for key, value in config.to_dict().items() if key not in PER_LAYER_CONFIG_KEYS}
    model = build_meta_model(CONFIG_MAPPING[family].from_dict(values))
    names = PerLayerNames.from_model(model)
    # Every kind of unit that it could lose: what was not pruned says its dense width, and is resized to that.
    units = [
        name
        for name, kind in KIND_BY_NAME.items()
        if kind != "layers" and kind not in architecture_info(model).unprunable
    ]
    _, modeling = generate_code(names, find_sites(model, units), model)
    package = f"{__name__}.{names.model_type}"
    beside = ModuleType(f"{package}.configuration_pruned")  # what the generated import finds
    vars(beside)[f"Pruned{names.config}"] = type(config)
    sys.modules |= {package: ModuleType(package), beside.__name__: beside}
    return names, _exec_source(modeling, f"{package}.modeling_pruned", package)


def _exec_source(text: str, name: str, package: str = "") -> dict[str, Any]:
    """What a text of our own templates defines."""
    defined: dict[str, Any] = {"__name__": name, "__package__": package}
    exec(compile(text, f"<{name}>", "exec"), defined)  # noqa: S102
    return defined
