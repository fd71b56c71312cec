"""Every option, and how it is read: a recipe (YAML) and flags to one frozen `RunConfig`."""

from prunetune.config.recipe import RunConfig, from_mapping, load_recipe

__all__ = ["RunConfig", "from_mapping", "load_recipe"]
