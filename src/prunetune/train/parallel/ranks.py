"""Ranks: the processes of one run, how they share a batch, and their collective operations.

A batch is a function of seed and step, so every rank knows all of it and takes its share. Losses are divided by the
counts of the whole batch and gradients are summed over ranks: the arithmetic of one process, but for the order of sums.
"""

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
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)  # how long a rank waits for the others before it fails
BUCKET_NUMBERS = 2**25  # summed over ranks at a time
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size`; with a single one, no method does anything."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    uses_fsdp: bool = False  # FSDP2: every rank holds a shard of each frozen weight

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder and prints."""
        return self.rank == 0

    def split_examples(self, examples: Sequence[Example]) -> list[list[Example]]:
        """One list a rank, of about equally many tokens: every example once; with few examples, some are empty."""
        if self.world_size == 1:
            return [list(examples)]
        shares: list[list[Example]] = [[] for _ in range(self.world_size)]
        loads = [0] * self.world_size
        for example in sorted(examples, key=lambda example: -len(example.token_ids)):
            rank = loads.index(min(loads))
            shares[rank].append(example)
            loads[rank] += len(example.token_ids)
        return shares

    @torch.no_grad()
    def all_reduce_sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum float tensors over ranks, in place; all ranks end up with the same bits."""
        if self.world_size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            sums = torch.split(flat, [tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [total.view_as(tensor) for total, tensor in zip(sums, bucket, strict=True)])

    def broadcast_from_main(self, value: T) -> T:
        """Rank 0's value, on all ranks; it is pickled between the processes of this launch."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def any_rank(self, flag: bool, name: str = "", tensors: Iterable[Tensor] = ()) -> bool:
        """Whether the flag is set on any rank; raises `ModelError` if the bits of `tensors` differ between ranks."""
        if self.world_size == 1:
            return flag
        bits = fingerprint(tensors, self.device)
        largest = torch.stack([torch.tensor(int(flag), device=self.device), bits, -bits])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        any_flag, highest, negated_lowest = largest.tolist()
        if highest != -negated_lowest:
            raise ModelError(
                f"the {name} differ between ranks, which should be impossible: continue from the last checkpoint with "
                "--resume, and report this with the type of the GPUs"
            )
        return bool(any_flag)

    def barrier(self) -> None:
        """Wait until all ranks have called this. A broadcast would not do: its sender does not wait."""
        if self.world_size > 1:
            token = torch.zeros((), device=self.device)
            dist.all_reduce(token)
            token.item()  # a GPU's kernels are only queued so far

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others: it may fill caches that they then read."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def barrier_before_failing(self) -> Iterator[None]:
        """If a limit stops the block on all ranks, none ends before rank 0 reports it: a launcher would stop all."""
        try:
            yield
        except LimitBroken:
            if self.world_size > 1 and dist.is_initialized():
                self.barrier()
            raise

    def destroy_process_group(self) -> None:
        """Leave the group once all ranks are done: what follows runs on rank 0 alone."""
        if self.world_size > 1:
            self.barrier()
            dist.destroy_process_group()


SINGLE_PROCESS = Ranks()


def init_distributed(device: torch.device) -> Ranks:
    """Join the other processes of the launch, if any. Raises `ConfigError` for launches that are not supported."""
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return SINGLE_PROCESS
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None:
        raise ConfigError(
            f"device {device} is one GPU, and {world_size} processes were launched: use auto, cuda or cpu"
        )
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no GPU for process {local_rank + 1} of this machine: it has {torch.cuda.device_count()}; "
            "lower --num_processes"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"several processes need CUDA or the CPU, not {device.type}: launch one process")
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ConfigError(f"{name} is not supported: launch with --multi_gpu, or with --use_fsdp --fsdp_version 2")
    if uses_fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("of FSDP only version 2 is supported: launch with --use_fsdp --fsdp_version 2")
    if uses_fsdp and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise ConfigError("offloading FSDP's weights is not supported: launch with --fsdp_offload_params false")
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=PROCESS_GROUP_TIMEOUT)
    return Ranks(rank, world_size, CPU if device.type == "cpu" else state.device, uses_fsdp)


def fingerprint(tensors: Iterable[Tensor], device: torch.device = CPU) -> Tensor:
    """A long scalar of the bits of float32 tensors; of whole numbers, so that the order of sums does not matter."""
    total = torch.zeros((), dtype=torch.long, device=device)
    for number, tensor in enumerate(tensors, 1):
        bits = tensor.detach().float().contiguous().flatten().view(torch.int32).long()
        total = total + (bits * torch.arange(number, number + len(bits), device=bits.device)).sum().to(device)
    return total // 2  # its negative is a long, too


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
