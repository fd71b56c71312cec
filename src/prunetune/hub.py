"""Per-layer checkpoints without `trust_remote_code`: registers their classes with transformers and vLLM.

A per-layer folder holds two generated modules, which run only where they are trusted. After `register()`, transformers
uses the classes of this package for such a folder and never runs those of the folder. vLLM calls `register` by itself,
through the entry point `vllm.general_plugins`.
"""

import sys

from prunetune.model.per_layer_classes import register_family
from prunetune.pruning.families import FAMILIES
from prunetune.utils.optional import is_installed

VLLM_BACKEND_MODULE = "vllm.model_executor.models.transformers:"  # for models that vLLM has no code of its own for


def register() -> None:
    """Register the per-layer classes of every family with transformers, and with vLLM where it is installed.

    It may be called again.
    """
    from transformers import CONFIG_MAPPING

    for family in FAMILIES:
        if family not in CONFIG_MAPPING:  # only a later transformers has it
            continue
        _, _, causal = register_family(family)
        if "vllm" in sys.modules or is_installed("vllm"):
            from vllm import ModelRegistry

            backend = "TransformersMoEForCausalLM" if FAMILIES[family].mixture else "TransformersForCausalLM"
            if causal.__name__ not in ModelRegistry.get_supported_archs():
                ModelRegistry.register_model(causal.__name__, VLLM_BACKEND_MODULE + backend)
