"""For all tests."""

from __future__ import annotations

import os

import torch

# Tests run in two processes, on models that only lose by sharing work; what they start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
