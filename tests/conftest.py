"""For all tests."""

from __future__ import annotations

import os
import tempfile

import torch

# Tests run in two processes, on models that only lose by sharing work; what they start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Code that tests generate is imported from here, not from the user's cache; set before transformers is imported.
MODULES = tempfile.TemporaryDirectory(prefix="prunetune-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
