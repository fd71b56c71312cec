"""Several processes that make one run: each takes its share of every batch, and all hold the same afterwards.

A batch is a function of seed and step, so every rank knows all of it and takes its part. Losses are divided by the
counts of the whole batch, gradients are summed over ranks: the arithmetic of one process, but for the order of sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from prunetune.data.encoding import Example
from prunetune.errors import ConfigError, LimitBroken, ModelError
from prunetune.utils.launch import rank_and_world_size

T = TypeVar("T")
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)  # how long a rank waits for the others before it gives them up
BUCKET = 2**25  # numbers that are summed over ranks at a time
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """One process among `world`; alone, nothing here does anything."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    uses_fsdp: bool = False  # FSDP2: every rank holds a part of each frozen weight

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder and talks to the user."""
        return self.rank == 0

    def split_examples(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Every example once: lists of about as many tokens, one a rank; some are empty where examples are few."""
        if self.world_size == 1:
            return [list(examples)]
        parts: list[list[Example]] = [[] for _ in range(self.world_size)]
        loads = [0] * self.world_size
        for example in sorted(examples, key=lambda example: -len(example.token_ids)):
            rank = loads.index(min(loads))
            parts[rank].append(example)
            loads[rank] += len(example.token_ids)
        return parts

    def local_examples(self, examples: Sequence[Example]) -> list[Example]:
        """This rank's part."""
        return self.split_examples(examples)[self.rank]

    @torch.no_grad()
    def all_reduce_sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum float tensors over ranks, in place; all ranks end up with the same bits."""
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(one) for part, one in zip(parts, bucket, strict=True)])

    def broadcast_from_main(self, value: T) -> T:
        """Rank 0's value, on all ranks; anything that can be pickled."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def any_rank(self, here: bool, what: str = "", tensors: Iterable[Tensor] = ()) -> bool:
        """Whether it is so on any rank; raises `ModelError` where the bits of `tensors` differ between ranks."""
        if self.world_size == 1:
            return here
        mark = fingerprint(tensors, self.device)
        seen = torch.stack([torch.tensor(int(here), device=self.device), mark, -mark])
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        found, high, low = seen.tolist()
        if high != -low:
            raise ModelError(
                f"the {what} differ between ranks, which should be impossible: go on from the last checkpoint with "
                "--resume, and report this with the kind of the GPUs"
            )
        return bool(found)

    def barrier(self) -> None:
        """Until all ranks are here. A broadcast would not do: its sender goes on at once."""
        if self.world_size > 1:
            here = torch.zeros((), device=self.device)
            dist.all_reduce(here)
            here.item()  # a GPU's kernels are only queued so far

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block first: it may fill caches that the others then read."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def barrier_before_failing(self) -> Iterator[None]:
        """Where a gate stops the block, it does on all ranks: none ends before rank 0 has told of it.

        A launcher stops all processes as soon as one has failed.
        """
        try:
            yield
        except LimitBroken:
            if self.world_size > 1 and dist.is_initialized():
                self.barrier()
            raise

    def destroy_process_group(self) -> None:
        """What follows is no work for several."""
        if self.world_size > 1:
            self.barrier()
            dist.destroy_process_group()


SINGLE_PROCESS = Ranks()


def init_distributed(device: torch.device) -> Ranks:
    """Meet the other processes of the launch; alone where there are none. Raises `ConfigError` for what cannot work."""
    rank, world = rank_and_world_size()
    if world == 1:
        return SINGLE_PROCESS
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    _refuse(device, world, shards)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=PROCESS_GROUP_TIMEOUT)
    return Ranks(rank, world, CPU if device.type == "cpu" else state.device, shards)


def _refuse(device: torch.device, world: int, shards: bool) -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None:
        raise ConfigError(f"device {device} is one GPU, and {world} processes were launched: use auto, cuda or cpu")
    if device.type == "cuda" and local >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no GPU for process {local + 1} of this machine: it has {torch.cuda.device_count()}; "
            "lower --num_processes"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"several processes need CUDA or the CPU, not {device.type}: launch one process")
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(f"{name} is not used here: launch with --multi_gpu, or with --use_fsdp --fsdp_version 2")
    if shards and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP is used in its second version only: launch with --use_fsdp --fsdp_version 2")
    if shards and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ConfigError("FSDP keeps its weights on the GPUs here: launch with --fsdp_offload_params false")


def fingerprint(tensors: Iterable[Tensor], device: torch.device = CPU) -> Tensor:
    """Of the bits of float32 tensors: a long scalar, by whole numbers, so that no order of sums matters."""
    total = torch.zeros((), dtype=torch.long, device=device)
    for number, tensor in enumerate(tensors, 1):
        bits = tensor.detach().float().contiguous().flatten().view(torch.int32).long()
        total = total + (bits * torch.arange(number, number + len(bits), device=bits.device)).sum().to(device)
    return total // 2  # its negative is a long, too


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
