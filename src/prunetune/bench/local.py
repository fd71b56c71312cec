"""A model as transformers runs it: prefill, then greedy steps with a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prunetune.bench import clock
from prunetune.bench.cuda_graph import CudaGraphStep
from prunetune.bench.models import ModelSpec
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner import BenchSample, ModelFacts, OutOfMemory, WorkEstimate
from prunetune.bench.timed_request import random_prompts, time_request
from prunetune.errors import ModelError
from prunetune.model.loading import load_model_and_tokenizer, pick_device, pick_dtype
from prunetune.utils import environment

_aten = torch.ops.aten


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Of both products for shapes [batch, heads, tokens, width], as if nothing were masked.

    Keys and values may have fewer heads than queries, which PyTorch 2.11's own formula refuses.
    """
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


ATTENTION = dict.fromkeys(
    (
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
    ),
    _attention_flops,
)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first that a folder has


class LocalRunner:
    """Opened at once. Tokens are random: arithmetic does not read them. No end of text stops a run early."""

    def __init__(self, model: ModelSpec, options: BenchOptions) -> None:
        self.spec, self.options = model, options
        self.device = pick_device(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.dtype = pick_dtype(options.dtype, self.device)
        import_module("transformers.modeling_utils")  # its import is not the model's loading
        self.baseline_bytes = clock.current_bytes(self.device) if clock.reset_peak_memory(self.device) else 0
        begun = clock.synchronized_time(self.device)
        with _raise_out_of_memory(f"the weights of {model.label}"):
            self.model = self._opened()
        self.load_s = clock.synchronized_time(self.device) - begun
        self.prefill, self.step, self.static = self.model, self.model, dict[int, Any]()
        if options.record:
            self.step = CudaGraphStep(self.model)
        elif options.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else None
            self.prefill = self.step = torch.compile(self.model, mode=mode, dynamic=False)

    def _opened(self) -> Any:
        return load_model_and_tokenizer(
            self.spec.source, device=self.device, dtype=self.dtype, trust_remote_code=self.spec.trust_remote_code
        ).model

    def facts(self) -> ModelFacts:
        """See `Runner`."""
        compiled = ", decode recorded" if self.options.record else ", compiled" if self.options.compile else ""
        return ModelFacts(
            runtime=f"transformers {version('transformers')}{compiled}",
            device=environment.device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            parameters=sum(weight.numel() for weight in self.model.parameters()),
            file_bytes=weight_bytes(self.spec.source),
            load_s=self.load_s,
        )

    def warm_up(self, batch: int) -> WorkEstimate:
        """See `Runner`."""
        try:
            flops = self._flops(batch)
            cache = self._run(batch)[1]
        except OutOfMemory:
            raise
        except Exception as broken:
            if not self.options.compile:
                raise
            lines = (line for line in str(broken).splitlines() if line.strip() and not line.endswith(" raised:"))
            reason = next(lines, type(broken).__name__)  # what a backend raised stands below that it did
            raise ModelError(
                f"model {self.spec.label}: cannot be compiled here ({reason}); leave --compile out"
            ) from broken
        return WorkEstimate(flops, decode_bytes(self.model, cache))

    def run(self, batch: int) -> BenchSample:
        """See `Runner`."""
        return self._run(batch)[0]

    def close(self) -> None:
        """See `Runner`: the process ends."""

    @cached_property
    def _meter(self) -> Any:
        return clock.energy_meter(self.device)

    def _tokens(self, batch: int) -> Tensor:
        return random_prompts(self.model, batch, self.options.prompt)

    def _cache(self, batch: int) -> Any:
        """An empty cache. What was compiled knows its cache by address, so that of a batch size is used again."""
        from transformers import DynamicCache, StaticCache

        if not (self.options.compile or self.options.record):
            return DynamicCache(config=self.model.config)
        if batch not in self.static:
            length = self.options.prompt + self.options.generate
            self.static = {batch: StaticCache(self.model.config, max_cache_len=length)}
            if self.options.compile:  # its tensors get their places outside of what is compiled
                self.model(self._tokens(batch), past_key_values=self.static[batch], use_cache=True, logits_to_keep=1)
        self.static[batch].reset()
        return self.static[batch]

    @torch.no_grad()
    def _flops(self, batch: int) -> float:
        """Of the prefill, as operators report them."""
        counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        with _raise_out_of_memory(f"batch {batch} of {self.spec.label}"), counter:
            self.model(self._tokens(batch), use_cache=False, logits_to_keep=1)
        return float(counter.get_total_flops())

    @torch.no_grad()
    def _run(self, batch: int) -> tuple[BenchSample, Any]:
        """The sample, and the cache as it is at the end."""
        with _raise_out_of_memory(f"batch {batch} of {self.spec.label}"):
            tokens, cache = self._tokens(batch), self._cache(batch)
            watched = clock.reset_peak_memory(self.device)
            before = self._meter() if self._meter else 0.0
            times = time_request(self.prefill, tokens, cache, self.options.generate, self.step)
        sample = BenchSample(
            total_s=times.total,
            prefill_s=times.prefill,
            decode_s=times.decode,
            peak_bytes=clock.peak_bytes(self.device) - self.baseline_bytes if watched else None,
            joules=self._meter() - before if self._meter else None,
        )
        return sample, cache


def weight_bytes(source: str) -> int:
    """Size of the files with the weights of a folder, a .gguf file or a fetched hub name; 0 where none are found."""
    place = Path(source)
    if place.is_file():
        return place.stat().st_size
    if not place.is_dir():
        from transformers.utils import cached_file

        place = Path(cached_file(source, "config.json")).parent
    sizes = [[file.stat().st_size for file in place.glob(pattern)] for pattern in WEIGHTS]
    return next((sum(found) for found in sizes if found), 0)


def decode_bytes(model: Any, cache: Any) -> float | None:
    """What a step reads: all weights but a look-up table of its own, and the cache; None where experts are chosen."""
    names = [name for name, _ in model.named_parameters()]
    if any(".experts." in name for name in names):
        return None
    weights = sum(weight.nbytes for weight in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:
        weights -= table.weight.nbytes
    held = (part for layer in cache.layers for part in (layer.keys, layer.values))
    return float(weights + sum(part.nbytes for part in held if part is not None))  # none where attention is gone


@contextmanager
def _raise_out_of_memory(what: str) -> Iterator[None]:
    """Say what does not fit into memory; every other error passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as failed:  # PyTorch's are runtime errors, on the CPU by their words alone
        if not isinstance(failed, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(failed):
            raise
        raise OutOfMemory(f"{what}: out of memory; lower --batch or --prompt, or name fewer models") from failed
