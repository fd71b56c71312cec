"""The options of a run: one frozen `RunConfig`, read from a recipe (YAML) and flags."""

from prunetune.config.recipe import RunConfig, from_mapping, load_recipe

__all__ = ["RunConfig", "from_mapping", "load_recipe"]
