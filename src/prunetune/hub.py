"""Per-layer checkpoints without `trust_remote_code`: registers their classes with transformers and vLLM.

A per-layer folder holds two generated modules, which run only where they are trusted. After `register()`, transformers
uses the classes of this module for such a folder and never runs those of the folder. vLLM calls `register` by itself,
through the entry point `vllm.general_plugins`. The code of a model is generated again from its configuration, by the
same templates, so both ways build the same model.
"""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

from prunetune.export.per_layer_code import generate_code
from prunetune.export.per_layer_config import MODEL_TYPE_PREFIX, PerLayerNames
from prunetune.export.per_layer_templates import CONFIGURATION_TEMPLATE
from prunetune.export.stock_config import build_meta_model
from prunetune.pruning.families import FAMILIES, architecture_info
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import KIND_BY_NAME, UnitKind
from prunetune.utils.optional import is_installed

VLLM_BACKEND_MODULE = "vllm.model_executor.models.transformers:"  # for models that vLLM has no code of its own for
PER_LAYER_CONFIG_KEYS = ("per_layer_config", "auto_map", "architectures", "model_type", "transformers_version")


def register() -> None:
    """Register the per-layer classes of every family with transformers, and with vLLM where it is installed.

    It may be called again.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

    for family in FAMILIES:
        if family not in CONFIG_MAPPING:  # only a later transformers has it
            continue
        config, base, causal = per_layer_classes(family)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        if "vllm" in sys.modules or is_installed("vllm"):
            from vllm import ModelRegistry

            backend = "TransformersMoEForCausalLM" if FAMILIES[family].mixture else "TransformersForCausalLM"
            if causal.__name__ not in ModelRegistry.get_supported_archs():
                ModelRegistry.register_model(causal.__name__, VLLM_BACKEND_MODULE + backend)


@cache
def per_layer_classes(family: str) -> tuple[Any, Any, Any]:
    """The classes of a family's per-layer checkpoints: configuration, base model, causal model."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    dense: Any = CONFIG_MAPPING[family]
    name, model_type = f"Pruned{dense.__name__}", MODEL_TYPE_PREFIX + family
    source = CONFIGURATION_TEMPLATE.substitute(
        config=dense.__name__, pruned_config=name, model_type=model_type, digest="registered by prunetune"
    )
    config = _exec_source(source, __name__)[name]
    base = getattr(transformers, MODEL_MAPPING_NAMES[family])
    causal = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    classes = (config, _resizing_class(base, config), _resizing_class(causal, config))
    for new_class in classes:
        setattr(sys.modules[__name__], new_class.__name__, new_class)  # where pickle looks for them
    return classes


def _resizing_class(stock: Any, config_class: Any) -> Any:
    """A subclass that builds the dense model and then resizes it to the widths of its configuration."""

    def init(self: Any, config: Any) -> None:
        names, code = _generated_code(config)
        stock.__init__(self, code["dense"](config))
        base = getattr(self, names.base_attribute, self)
        code["resize"](self, base.get_submodule(names.layers_path), config)

    init.__annotations__.clear()  # vLLM checks arguments against annotations, which have to be classes then
    members = {"config_class": config_class, "__init__": init, "__module__": __name__}
    return type(f"Pruned{stock.__name__}", (stock,), members)


def _generated_code(config: Any) -> tuple[PerLayerNames, dict[str, Any]]:
    """(names, definitions) of the modeling module that a checkpoint of this configuration holds."""
    from transformers import CONFIG_MAPPING

    family = config.model_type.removeprefix(MODEL_TYPE_PREFIX)
    values = {key: value for key, value in config.to_dict().items() if key not in PER_LAYER_CONFIG_KEYS}
    model = build_meta_model(CONFIG_MAPPING[family].from_dict(values))
    names = PerLayerNames.from_model(model)
    # Every kind of unit that could be pruned: one that was not is resized to its dense width, which it has.
    units = [
        name
        for name, kind in KIND_BY_NAME.items()
        if kind is not UnitKind.LAYER and kind not in architecture_info(model).unprunable
    ]
    _, modeling = generate_code(names, find_sites(model, units), model)
    package = f"{__name__}.{names.model_type}"
    configuration = ModuleType(f"{package}.configuration_pruned")  # the generated modeling module imports it
    vars(configuration)[f"Pruned{names.config}"] = type(config)
    sys.modules |= {package: ModuleType(package), configuration.__name__: configuration}
    return names, _exec_source(modeling, f"{package}.modeling_pruned", package)


def _exec_source(source: str, name: str, package: str = "") -> dict[str, Any]:
    """The definitions of a module whose source is made from our own templates."""
    definitions: dict[str, Any] = {"__name__": name, "__package__": package}
    exec(compile(source, f"<{name}>", "exec"), definitions)  # noqa: S102
    return definitions
