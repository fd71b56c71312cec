"""A .gguf file as llama.cpp runs it, by the server in the package xllamacpp and its own clocks."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunetune.bench import clock
from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner import BenchSample, ModelFacts, WorkEstimate
from prunetune.errors import ModelError
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.llamacpp import start_server
from prunetune.utils.optional import import_optional

CPU = torch.device("cpu")  # what the package is built for
MILLI = 1e-3
REPLY_TIMEOUT_S = 600.0  # seconds for a reply


class LlamaCppRunner:
    """One prompt is timed by llama.cpp itself. Several are sent at once, and only their whole is timed: the server
    mixes one's prefill with another's steps."""

    def __init__(self, model: ModelSpec, options: BenchOptions) -> None:
        self.spec, self.options, self.file = model, options, Path(model.source)
        self.parameters, self.vocabulary, self.kind = _described(self.file)
        self.threads = options.threads or torch.get_num_threads()
        import_optional("xllamacpp", extra="llamacpp", use=f"model {self.file}")
        self.baseline_bytes = clock.current_bytes(CPU) if clock.reset_peak_memory(CPU) else 0
        begun = time.perf_counter()
        slots, length = max(options.batches), options.prompt + options.generate + 8
        self.server = start_server(self.file, context=slots * length, slots=slots, threads=self.threads, on_cpu=True)
        self.load_s = time.perf_counter() - begun
        self.client = EndpointClient(
            self.server.listening_address, timeout=REPLY_TIMEOUT_S, concurrency=max(options.batches)
        )

    def facts(self) -> ModelFacts:
        """See `Runner`."""
        return ModelFacts(
            runtime=f"llama.cpp (xllamacpp {version('xllamacpp')})",
            device=f"{self.threads} CPU threads",
            dtype=self.kind,
            parameters=self.parameters,
            file_bytes=self.file.stat().st_size,
            load_s=self.load_s,
        )

    def warm_up(self, batch: int) -> WorkEstimate:
        """See `Runner`."""
        self.run(batch)
        return estimate_gguf_work(self.file, self.options.prompt * batch)

    def run(self, batch: int) -> BenchSample:
        """See `Runner`."""
        watched = clock.reset_peak_memory(CPU)
        begun = time.perf_counter()
        with ThreadPoolExecutor(batch) as pool:
            told = list(pool.map(self._ask, range(batch)))
        total = time.perf_counter() - begun
        peak = clock.peak_bytes(CPU) - self.baseline_bytes if watched else None
        if batch > 1:
            return BenchSample(total, peak_bytes=peak)
        prefill, steps = told[0]["prompt_ms"] * MILLI, told[0]["predicted_ms"] * MILLI
        # llama.cpp counts the steps' time from the first token on.
        return BenchSample(total, prefill, steps / (self.options.generate - 1), peak)

    def close(self) -> None:
        """See `Runner`: the process ends."""

    def _ask(self, seed: int) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.vocabulary, (self.options.prompt,), generator=rng).tolist()
        body = {
            "prompt": tokens,
            "n_predict": self.options.generate,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        timings: dict[str, Any] = self.client.post("/completion", body)["timings"]
        if timings["prompt_n"] != self.options.prompt or timings["predicted_n"] != self.options.generate:
            raise ModelError(
                f"model {self.file}: llama.cpp read {timings['prompt_n']} tokens and wrote {timings['predicted_n']}, "
                f"not {self.options.prompt} and {self.options.generate}; lower --prompt or --batch"
            )
        return timings


def gguf_context_length(file: Path) -> int:
    """Positions that a file's model knows; 0 where it says none. Raises `ModelError` for what is no GGUF."""
    reader = _reader(file)
    architecture = reader.get_field("general.architecture")
    field = reader.get_field(f"{architecture.contents()}.context_length") if architecture else None
    return int(field.contents()) if field else 0


def estimate_gguf_work(file: Path, tokens: int) -> WorkEstimate:
    """FLOPs of the blocks' matrices over so many tokens, and the bytes of all weights but a look-up table of its own;
    attention between tokens and the cache are left out. Nothing where experts are chosen."""
    tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
    if any("_exps." in name for name in tensors):
        return WorkEstimate()
    blocks = sum(int(each.n_elements) for name, each in tensors.items() if "blk." in name and len(each.shape) > 1)
    looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
    read = sum(int(each.n_bytes) for name, each in tensors.items() if name not in looked_up)
    return WorkEstimate(2.0 * blocks * tokens, float(read))


def _described(file: Path) -> tuple[int, int, str]:
    """Parameters, size of the vocabulary, and the type that most weights have."""
    reader = _reader(file)
    held: dict[str, int] = {}
    for tensor in reader.tensors:
        held[tensor.tensor_type.name] = held.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    return sum(held.values()), len(tokens.data), max(held, key=lambda kind: held[kind]).lower()


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, OSError) as broken:
        raise ModelError(f"model {file}: cannot be read as GGUF: {broken}; check the file") from broken
