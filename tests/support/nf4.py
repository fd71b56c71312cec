"""A mark for tests that need bitsandbytes."""

from __future__ import annotations

import importlib.util

import pytest

needs_nf4 = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'prunetune[quant]'",
)
