"""One lock: for recording a CUDA graph, and for what another thread must not do meanwhile."""

from __future__ import annotations

import threading

# Recording runs the model's Python under hooks and settings that two threads cannot use at once. Linear algebra
# (`torch.linalg`) in one thread ends another one's recording: "operation not permitted when stream is capturing".
CAPTURE_LOCK = threading.Lock()
