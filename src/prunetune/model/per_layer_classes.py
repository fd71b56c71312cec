"""The package's own classes of per-layer models, by which a per-layer folder opens without running its modules.

The code of a model is generated from its configuration, by the templates that the folder's modules are written from, so
both build the same model.
"""

import logging
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from prunetune.errors import ModelError
from prunetune.model.per_layer_code import generate_code
from prunetune.model.per_layer_templates import CONFIGURATION_TEMPLATE
from prunetune.pruning.families import MODEL_TYPE_PREFIX
from prunetune.utils.untrusted import parse_json

log = logging.getLogger(__name__)


def register_folder(folder: Path) -> None:
    """Let transformers open a per-layer folder by the classes of this package, whatever its modules say.

    Other folders, and families that this version does not know, are left alone: code in them needs
    `trust_remote_code`. A module that this version would write otherwise is named in the log.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    try:
        values = parse_json((folder / "config.json").read_bytes())
        family = values["model_type"].removeprefix(MODEL_TYPE_PREFIX)
        is_per_layer = family != values["model_type"] and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        is_per_layer = is_per_layer and family in MODEL_MAPPING_NAMES
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # loading says what is wrong with the file
    if is_per_layer:
        register_family(family)
        _tell_foreign_code(folder.resolve(), (folder / "config.json").read_bytes())


@cache
def _tell_foreign_code(folder: Path, config_json: bytes) -> None:
    try:
        modules = generate_code(parse_json(config_json), folder)[1]
    except (ModelError, ValueError, TypeError, KeyError, AttributeError, RuntimeError):
        return  # loading says what is wrong with the configuration
    present = {name: folder / name for name in modules if (folder / name).is_file()}
    for name, file in present.items():
        if file.read_bytes() != modules[name].encode():
            log.warning(
                "%s was not written by this version of prunetune and does not run: prunetune's own classes are used",
                file,
            )


def register_family(family: str) -> tuple[Any, Any, Any]:
    """Register a family's `per_layer_classes` with transformers, and return them. It may be called again."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config, base, causal = classes = per_layer_classes(family)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    return classes


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
        names, modules = generate_code(config.to_dict() | {"model_type": config.model_type}, config.name_or_path)
        package = f"{__name__}.{names.model_type}"
        configuration = ModuleType(f"{package}.configuration_pruned")  # the generated modeling module imports it
        vars(configuration)[f"Pruned{names.config}"] = type(config)
        sys.modules |= {package: ModuleType(package), configuration.__name__: configuration}
        code = _exec_source(modules["modeling_pruned.py"], f"{package}.modeling_pruned", package)
        stock.__init__(self, code["dense"](config))
        base = getattr(self, names.base_attribute, self)
        code["resize"](self, base.get_submodule(names.layers_path), config)

    init.__annotations__.clear()  # vLLM checks arguments against annotations, which have to be classes then
    members = {"config_class": config_class, "__init__": init, "__module__": __name__}
    return type(f"Pruned{stock.__name__}", (stock,), members)


def _exec_source(source: str, name: str, package: str = "") -> dict[str, Any]:
    """The definitions of a module whose source is made from our own templates."""
    definitions: dict[str, Any] = {"__name__": name, "__package__": package}
    exec(compile(source, f"<{name}>", "exec"), definitions)  # noqa: S102
    return definitions
