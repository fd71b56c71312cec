"""A .gguf file timed in llama.cpp: by the server of the package xllamacpp, on the CPU, with its own timings."""

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prunetune.bench import clock
from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner_protocol import BenchSample, ModelFacts, WorkEstimate
from prunetune.errors import ModelError
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.llamacpp import start_server
from prunetune.utils.failures import reading_model_files
from prunetune.utils.optional import import_optional

CPU = torch.device("cpu")  # the package is built for it
MILLI = 1e-3
REPLY_TIMEOUT_S = 600.0  # seconds until a request fails


class LlamaCppRunner:
    """A `Runner`: a llama.cpp server that runs while this is open.

    A batch of one is timed by llama.cpp itself. Several prompts are sent at once, and only their total is timed, since
    the server mixes the prefill of one with the decode steps of others.
    """

    def __init__(self, model: ModelSpec, options: BenchOptions) -> None:
        self.spec, self.options, self.file = model, options, Path(model.source)
        self.parameters, self.vocabulary, self.dtype = _describe(self.file)
        self.threads = options.threads or torch.get_num_threads()
        import_optional("xllamacpp", extra="llamacpp", use=f"model {self.file}")
        self.baseline_bytes = clock.current_bytes(CPU) if clock.reset_peak_memory(CPU) else 0
        start = time.perf_counter()
        slots, length = max(options.batches), options.prompt + options.generate + 8
        self.server = start_server(self.file, context=slots * length, slots=slots, threads=self.threads, on_cpu=True)
        self.load_s = time.perf_counter() - start
        self.client = EndpointClient(self.server.listening_address, timeout=REPLY_TIMEOUT_S, concurrency=slots)

    def facts(self) -> ModelFacts:
        return ModelFacts(
            runtime=f"llama.cpp (xllamacpp {version('xllamacpp')})",
            device=f"{self.threads} CPU threads",
            dtype=self.dtype,
            parameters=self.parameters,
            file_bytes=self.file.stat().st_size,
            load_s=self.load_s,
        )

    def warm_up(self, batch: int) -> WorkEstimate:
        self.run(batch)
        return estimate_gguf_work(self.file, self.options.prompt * batch)

    def run(self, batch: int) -> BenchSample:
        has_peak = clock.reset_peak_memory(CPU)
        start = time.perf_counter()
        with ThreadPoolExecutor(batch) as pool:
            timings = list(pool.map(self._complete, range(batch)))
        total = time.perf_counter() - start
        peak = clock.peak_bytes(CPU) - self.baseline_bytes if has_peak else None
        if batch > 1:
            return BenchSample(total, peak_bytes=peak)
        prefill, decode = timings[0]["prompt_ms"] * MILLI, timings[0]["predicted_ms"] * MILLI
        # llama.cpp's time of decoding starts at the first token.
        return BenchSample(total, prefill, decode / (self.options.generate - 1), peak)

    def _complete(self, seed: int) -> dict[str, Any]:
        """Complete one random prompt and return llama.cpp's timings."""
        rng, prompt, generate = torch.Generator().manual_seed(seed), self.options.prompt, self.options.generate
        tokens = torch.randint(self.vocabulary, (prompt,), generator=rng).tolist()
        body = {"prompt": tokens, "n_predict": generate, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        timings: dict[str, Any] = self.client.post("/completion", body)["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (prompt, generate):
            raise ModelError(
                f"model {self.file}: llama.cpp read {timings['prompt_n']} tokens and wrote {timings['predicted_n']}, "
                f"not {prompt} and {generate}; lower --prompt or --batch"
            )
        return timings


def gguf_context_length(file: Path) -> int:
    """Positions of a file's model; 0 if it does not say. Raises `ModelError` if the file is not GGUF."""
    reader = _reader(file)
    architecture = reader.get_field("general.architecture")
    field = reader.get_field(f"{architecture.contents()}.context_length") if architecture else None
    return int(field.contents()) if field else 0


def estimate_gguf_work(file: Path, tokens: int) -> WorkEstimate:
    """FLOPs of the layers' matrices over so many tokens, and bytes of all weights but an untied embedding table.

    Attention between tokens and the cache are left out. Empty for mixtures, where a token uses only some experts.
    """
    tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
    if any("_exps." in name for name in tensors):
        return WorkEstimate()
    matrices = [tensor for name, tensor in tensors.items() if "blk." in name and len(tensor.shape) > 1]
    looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
    bytes_read = sum(int(tensor.n_bytes) for name, tensor in tensors.items() if name not in looked_up)
    return WorkEstimate(2.0 * sum(int(tensor.n_elements) for tensor in matrices) * tokens, float(bytes_read))


def _describe(file: Path) -> tuple[int, int, str]:
    """(parameters, size of the vocabulary, type of most weights)."""
    reader = _reader(file)
    params_by_type: dict[str, int] = {}
    for tensor in reader.tensors:
        type_name = tensor.tensor_type.name
        params_by_type[type_name] = params_by_type.get(type_name, 0) + int(tensor.n_elements)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    main_type = max(params_by_type, key=lambda name: params_by_type[name])
    return sum(params_by_type.values()), len(tokens.data), main_type.lower()


def _reader(file: Path) -> Any:
    from gguf import GGUFReader

    with reading_model_files(f"model {file}: cannot be read as GGUF", "check the file or fetch it again"):
        return GGUFReader(file)
