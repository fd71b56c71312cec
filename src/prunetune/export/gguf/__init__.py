"""GGUF files for llama.cpp: which architectures it reads, their tensors and keys, and the check in llama.cpp itself."""
