"""One rank of `train/parallel/test_ranks.py`: runs every scenario in turn; rank 0 writes the results as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import yaml
from torch import distributed as dist

from prunetune.config.fields import merge_mappings
from prunetune.config.recipe import from_mapping
from prunetune.data.encoding import Example
from prunetune.errors import PrunetuneError
from prunetune.export import selfcheck
from prunetune.export.checkpoint import WrittenCheckpoint
from prunetune.pipeline.run import run
from prunetune.pruning.sites import find_sites
from prunetune.pruning.units import DEFAULT_UNITS
from prunetune.train import loop
from prunetune.train.checkpoints import Checkpoints, CheckpointStore, NullCheckpointStore
from prunetune.train.forward import Teacher
from prunetune.train.parallel.distributed import distribute_checkpoints, distribute_passes, shard_layers
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks, init_distributed
from prunetune.train.passes import PackedPasses, PassSize
from prunetune.train.step_guard import StepGuard
from support.again import ReaderHere
from support.loop import config_of, job_of
from support.models import tiny

STEPS = 20
STOP = 9  # between the second cut and the third
CHANGES: dict[str, Any] = {
    "train": {"steps": STEPS, "batch_size": 5, "learning_rate": 1e-3, "checkpoint_every": 6, "validate_every": 10},
    "search": {"batch_size": 3, "init_batches": 1, "cuts": 3, "span": 0.75},  # cuts before the steps 1, 6 and 11
}
PACKED: dict[str, Any] = {"train": {"steps": 2}, "search": {"cuts": 2}}  # a cut starts new recordings, which is slow


# Other runs, of 6 steps each: (whether weights are sharded, arguments of `result`).
OTHERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "generator": (True, {"train": {"steps": 6}, "search": {"method": "generator"}}),
    "all weights": (False, {"train": {"steps": 6, "weights": "all"}}),
    "few examples": (True, {"train": {"steps": 6, "batch_size": 1}, "search": {"batch_size": 1}}),
    "layers": (True, {"train": {"steps": 6}, "units": ("layers", *DEFAULT_UNITS)}),
    "tied": (True, {"train": {"steps": 6}, "family": "gpt2"}),
}


class Stopped(Exception):
    """The run is stopped from outside."""


def result(
    ranks: Ranks,
    store: CheckpointStore | None = None,
    *,
    stop: int = 0,
    distil: bool = False,
    family: str = "llama",
    units: tuple[str, ...] = DEFAULT_UNITS,
    **changes: Any,
) -> dict[str, Any]:
    """Plan, losses and validations of a run of the loop; stopped after `stop` steps, if not 0."""
    config, model = config_of(merge_mappings(CHANGES, changes)), tiny(family, tie_word_embeddings=family == "gpt2")
    job = job_of(config, store=distribute_checkpoints(store or NullCheckpointStore(), ranks), model=model)
    job = replace(job, ranks=ranks, sites=find_sites(model, units))
    if distil:
        teacher = tiny(seed=3).requires_grad_(False)
        shard_layers(teacher, ranks)
        job = replace(job, teacher=Teacher(teacher, is_tuned=False, share=0.5))
    if stop:
        observer: Any = job.observer
        record_step = observer.step

        def step(record: dict[str, Any]) -> None:
            record_step(record)
            if record["step"] == stop:
                raise Stopped

        observer.step = step
    try:
        plan = loop.tune_and_prune(job).to_json()
    except Stopped:
        plan = ""
    notes: Any = job.observer
    return {
        "plan": plan,
        "loss": [record["loss"] for record in notes.steps],
        "valid": [record["nll"] for record in notes.validations],
    }


def packed(ranks: Ranks) -> dict[str, Any]:
    """The same with packed passes, which runs on a GPU use."""
    before = loop.build_passes
    loop.build_passes = PackedPasses  # type: ignore[assignment]
    try:
        return result(ranks, **PACKED)
    finally:
        loop.build_passes = before


class FailingPasses:
    """Passes whose memory runs out above 16 tokens, on rank 1 alone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.size = ranks, PassSize(64, recompute=False)

    def score(self, examples: Sequence[Example], gates: Any) -> float:
        if self.ranks.rank == 1 and self.size.micro_tokens > 16:
            raise torch.OutOfMemoryError("full")
        return 1.0

    def reset_recordings(self) -> None:
        pass


def micro_tokens_after_retry(ranks: Ranks) -> int:
    """The size of passes on which all ranks agree; for a rank that continued alone, the others would wait for ever."""
    passes: Any = distribute_passes(FailingPasses(ranks), None, ranks)  # type: ignore[arg-type]
    guard = StepGuard(passes, 0)
    guard.retry_smaller([Example((1, 2), 1)], lambda: passes.score((), {}), lambda: None)
    return int(ranks.broadcast_from_main(guard.passes.size.micro_tokens))


def waits_at_barrier(ranks: Ranks, folder: Path) -> bool:
    """Whether rank 0, once it has waited at the barrier, finds the file that the late rank 1 wrote before.

    As with NCCL, where the sender of a broadcast does not wait; gloo's would.
    """
    mark, before, sent = folder / "mark", dist.broadcast_object_list, list[Thread]()

    def send(*given: Any, **named: Any) -> None:
        sent.append(Thread(target=before, args=given, kwargs=named))
        sent[-1].start()

    if ranks.is_main:
        dist.broadcast_object_list = send
    else:
        time.sleep(1)
        mark.touch()
    ranks.barrier()
    results = mark.exists()
    dist.broadcast_object_list = before
    for thread in sent:
        thread.join()
    return results


def refused(work: Callable[[], object]) -> str:
    """The message of the error, empty without one."""
    try:
        work()
    except PrunetuneError as error:
        return str(error)
    return ""


class StreamedReader(ReaderHere):
    """Sharded weights are cut layer by layer, and so are they read."""

    def read(self, written: WrittenCheckpoint, tokens: torch.Tensor, **how: Any) -> dict[str, torch.Tensor]:
        assert how["streamed"]
        return super().read(written, tokens)


def scenarios(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Results of all scenarios by name."""
    sharded = replace(ranks, uses_fsdp=True)
    results = {name: result(sharded if shards else ranks, **how) for name, (shards, how) in OTHERS.items()}
    results |= {
        "packed": packed(ranks),
        "ddp": result(ranks),
        "fsdp": result(sharded, distil=True),
        "one to two": result(sharded, Checkpoints(folder / "one")),
        "two to one": result(ranks, Checkpoints(folder / "two"), stop=STOP),
        "micro tokens": micro_tokens_after_retry(ranks),
        "waits": waits_at_barrier(ranks, folder),
        "differ": refused(lambda: ranks.any_rank(False, "gates", [torch.tensor([1.0, float(ranks.rank)])])),
    }
    selfcheck.FreshReader = StreamedReader  # type: ignore[assignment]
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    run(from_mapping(yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))))
    return results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = init_distributed(torch.device("cpu"))
    assert ranks is not SINGLE_PROCESS
    results = scenarios(ranks, folder)
    if ranks.is_main:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
