"""A model timed in transformers: prefill, then greedy decode steps; eager, compiled or as a CUDA graph."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prunetune.bench import clock
from prunetune.bench.clock import random_prompts, time_request
from prunetune.bench.cuda_graph import CudaGraphStep
from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner_protocol import BenchSample, ModelFacts, OutOfMemory, WorkEstimate
from prunetune.errors import ModelError
from prunetune.model.checksums import verify_checksums
from prunetune.model.loading import load_model_and_tokenizer, pick_device, pick_dtype, weight_files
from prunetune.model.onnx_model import is_onnx_folder, onnx_files
from prunetune.utils import environment


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of both products for shapes [batch, heads, tokens, width], without a mask.

    Keys and values may have fewer heads than queries, for which PyTorch 2.11's own formula fails.
    """
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


KERNELS = ("flash", "efficient", "cudnn")
ATTENTION = {getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention"): _attention_flops for name in KERNELS}


class LocalRunner:
    """A `Runner` that loads its model when it is created. Prompts are random; no end-of-text token ends a run early."""

    def __init__(self, model: ModelSpec, options: BenchOptions) -> None:
        self.spec, self.options = model, options
        self.device = torch.device("cpu") if is_onnx_folder(Path(model.source)) else pick_device(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.dtype = pick_dtype(options.dtype, self.device)
        import_module("transformers.modeling_utils")  # importing it is not counted as loading, nor are checksums
        verify_checksums(Path(model.source))
        self.baseline_bytes = clock.current_bytes(self.device) if clock.reset_peak_memory(self.device) else 0
        start = clock.synchronized_time(self.device)
        with _raise_out_of_memory(f"the weights of {model.label}"):
            self.model = load_model_and_tokenizer(
                model.source, device=self.device, dtype=self.dtype, trust_remote_code=model.trust_remote_code
            ).model
        self.load_s = clock.synchronized_time(self.device) - start
        self.prefill, self.step = self.model, self.model
        arguments = inspect.signature(self.model.forward).parameters
        if not arguments.keys() & {"past_key_values", "cache"}:  # state-space models; cache: since transformers 5.24
            if "cache_params" not in arguments or options.record or options.compile:
                raise ModelError(
                    f"model {model.label}: transformers passes its states in a way that is not timed here; leave "
                    "--compile and --record out, or name another model"
                )
            self.prefill = self.step = lambda tokens, *, past_key_values, **others: self.model(
                tokens, cache_params=past_key_values, **others
            )
        self.static_caches: dict[int, Any] = {}  # by batch size, of the last one
        if options.record:
            self.step = CudaGraphStep(self.model)
        elif options.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.prefill = self.step = torch.compile(self.model, mode=mode, dynamic=False)
        self.energy_meter = clock.energy_meter(self.device)

    def facts(self) -> ModelFacts:
        runtime = getattr(self.model, "runtime", f"transformers {version('transformers')}")
        compiled = ", decode recorded" if self.options.record else ", compiled" if self.options.compile else ""
        return ModelFacts(
            runtime=f"{runtime}{compiled}",
            device=environment.device_name(self.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            parameters=sum(weight.numel() for weight in self.model.parameters()) or self.model.num_parameters(),
            file_bytes=weight_bytes(self.spec.source),
            load_s=self.load_s,
        )

    def warm_up(self, batch: int) -> WorkEstimate:
        try:
            flops = self._flops(batch)
            cache = self._run(batch)[1]
        except OutOfMemory:
            raise
        except Exception as broken:
            if not self.options.compile:
                raise
            lines = (line for line in str(broken).splitlines() if line.strip() and not line.endswith(" raised:"))
            reason = next(lines, type(broken).__name__)  # the backend's own error is below a line that announces it
            raise ModelError(
                f"model {self.spec.label}: cannot be compiled here ({reason}); leave --compile out"
            ) from broken
        return WorkEstimate(flops, decode_bytes(self.model, cache))

    def run(self, batch: int) -> BenchSample:
        return self._run(batch)[0]

    def _tokens(self, batch: int) -> Tensor:
        return random_prompts(self.model, batch, self.options.prompt)

    def _cache(self, batch: int) -> Any:
        """An empty cache. Compiled and recorded steps are bound to their cache by address, so theirs is used again."""
        from transformers import DynamicCache, StaticCache

        if not (self.options.compile or self.options.record):
            return DynamicCache(config=self.model.config)
        if batch not in self.static_caches:
            length = self.options.prompt + self.options.generate
            cache = StaticCache(self.model.config, max_cache_len=length)
            self.static_caches = {batch: cache}
            if self.options.compile:  # allocates its tensors, outside of the compiled step
                self.model(self._tokens(batch), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.static_caches[batch].reset()
        return self.static_caches[batch]

    @torch.no_grad()
    def _flops(self, batch: int) -> float | None:
        """FLOPs of the prefill, as operators report them."""
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with _raise_out_of_memory(f"batch {batch} of {self.spec.label}"), counter:
            self.model(self._tokens(batch), use_cache=False, logits_to_keep=1)
        return float(counter.get_total_flops()) or None  # none are counted in onnxruntime

    @torch.no_grad()
    def _run(self, batch: int) -> tuple[BenchSample, Any]:
        """(sample, cache at the end of the run)."""
        with _raise_out_of_memory(f"batch {batch} of {self.spec.label}"):
            tokens, cache = self._tokens(batch), self._cache(batch)
            has_peak = clock.reset_peak_memory(self.device)
            joules_before = self.energy_meter() if self.energy_meter else 0.0
            times = time_request(self.prefill, tokens, cache, self.options.generate, self.step)
        sample = BenchSample(
            total_s=times.total,
            prefill_s=times.prefill,
            decode_s=times.decode,
            peak_bytes=clock.peak_bytes(self.device) - self.baseline_bytes if has_peak else None,
            joules=self.energy_meter() - joules_before if self.energy_meter else None,
        )
        return sample, cache


def weight_bytes(source: str) -> int:
    """Bytes of the weight files of a folder, a .gguf file or a downloaded hub name; 0 if there are none."""
    path = Path(source)
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in onnx_files(path) or weight_files(source))


def decode_bytes(model: Any, cache: Any) -> float | None:
    """Bytes that a decode step reads: the cache, and all weights but an embedding table that is not also the head.

    None for mixtures, where a step reads only some experts, for a cache that has no layers to count, and for a graph.
    """
    names = [name for name, weight in model.named_parameters() if weight.numel()]
    if not names or any(".experts." in name for name in names) or not hasattr(cache, "layers"):
        return None
    weights = sum(weight.nbytes for weight in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:
        weights -= table.weight.nbytes
    # Keys and values; hybrids hold states of convolutions and recurrences, in dicts.
    held = [value for layer in cache.layers for value in vars(layer).values()]
    flat = [tensor for value in held for tensor in (value.values() if isinstance(value, dict) else [value])]
    return float(weights + sum(state.nbytes for state in flat if isinstance(state, Tensor)))


@contextmanager
def _raise_out_of_memory(subject: str) -> Iterator[None]:
    """Raises `OutOfMemory` with the subject that does not fit; other errors are not changed."""
    try:
        yield
    except (MemoryError, RuntimeError) as failed:  # on the CPU, PyTorch raises a RuntimeError of this text
        if not isinstance(failed, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(failed):
            raise
        raise OutOfMemory(f"{subject}: out of memory; lower --batch or --prompt, or name fewer models") from failed
