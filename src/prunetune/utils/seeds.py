"""Seeds derived from the run's seed, a purpose and a step, so that no generator's state has to be saved."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed, different for each purpose and step."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
