"""Checkpoints that stock runtimes open: safetensors, GGUF, ONNX, quantised; each written, reopened and compared."""
