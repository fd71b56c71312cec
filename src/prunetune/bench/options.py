"""Options of `prunetune bench`; imports nothing heavy, since the command line reads it at every start."""

from dataclasses import dataclass
from typing import Literal

from prunetune.config.fields import option
from prunetune.errors import ConfigError
from prunetune.utils.untrusted import short_repr


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How models are opened and what is timed. Each field is a flag of the command."""

    prompt: int = option(512, "Tokens of the prompt.", ge=1)
    generate: int = option(64, "Tokens to write; the first comes from the prefill.", ge=2)
    batch: str = option("1,8", "Batch sizes, by commas.")
    runs: int = option(5, "Measured rounds of a batch size, after one to warm up.", ge=1)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Of every model that transformers opens; auto: bfloat16 where the hardware has it, else float32."
    )
    threads: int = option(0, "CPU threads; 0: what PyTorch takes.", ge=0)
    compile: bool = option(
        False, "Compile prefill and decode step (torch.compile, static cache): minutes for a large model."
    )
    record: bool = option(False, "Replay the decode step from a CUDA graph (static cache), as serving runtimes do.")
    dense: bool = option(True, "Measure a run's dense model as well, before it.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")

    def __post_init__(self) -> None:
        if self.compile and self.record:
            raise ConfigError("bench: --compile and --record exclude each other; name one")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes in the order given, each once; raises `ConfigError`."""
        sizes = [size.strip() for size in self.batch.split(",")]
        if not all(size.isdecimal() and len(size) < 10 and int(size) for size in sizes):
            raise ConfigError(f"batch {short_repr(self.batch)}: name sizes of at least 1 by commas, such as 1,8")
        return tuple(dict.fromkeys(map(int, sizes)))
