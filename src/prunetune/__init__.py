"""Tune and structurally prune a language model for one domain, in one run."""

from prunetune.config import RunConfig
from prunetune.model.masking import masked
from prunetune.model.sites import find_sites
from prunetune.model.surgery import cut
from prunetune.plan import Plan

__all__ = ["Plan", "RunConfig", "cut", "find_sites", "masked"]
