"""Laws of several ranks: decisions, losses and weights equal those of one process; any number resumes a run."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prunetune.config.recipe import from_mapping
from prunetune.data.encoding import Example
from prunetune.errors import ConfigError, LimitBroken, ModelError
from prunetune.pipeline.prepare import prepare
from prunetune.pipeline.stages import train
from prunetune.runs.folder import RunFolder, create_run_folder
from prunetune.train.checkpoints import Checkpoints
from prunetune.train.parallel.distributed import distribute_passes
from prunetune.train.parallel.ranks import SINGLE_PROCESS, Ranks, fingerprint, init_distributed
from prunetune.train.passes import PassSize
from prunetune.train.step_guard import StepGuard
from prunetune.utils.console import SilentConsole
from prunetune.utils.failures import is_lost_rank
from prunetune.utils.launch import rank_and_world_size, single_process_error
from support.data import write_lines
from support.distributed_worker import OTHERS, PACKED, STEPS, STOP, result
from support.evaluation import characters, speaker

TESTS = Path(__file__).parents[2]
CLOSE = 1e-5
RECIPE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "budget": {"keep": 0.6, "align": 8},
    "train": {"steps": 8, "batch_size": 3, "learning_rate": 1e-3, "validate_every": 4, "weights": "adapters"},
    "lora": {"rank": 4},
    "search": {"share": 0.4, "settle": 0.25, "init_batches": 1, "batch_size": 4},
    "evaluate": {"drift": False, "limit": 2, "generate_limit": 0, "dense_tuned": False},
    "distill": {"teacher": "base"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, a recipe, and the checkpoints of an interrupted run of one process."""
    folder = tmp_path_factory.mktemp("place")
    speaker().save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    rows = [{"prompt": f"Repeat {n}: ", "completion": f"{n} {n}", "task": "open"} for n in range(24)]
    write_lines(folder / "rows.jsonl", *rows)
    paths = {
        "model": str(folder / "dense"),
        "out": str(folder / "run"),
        "data": {"train": [str(folder / "rows.jsonl")]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | paths), encoding="utf-8")
    result(SINGLE_PROCESS, Checkpoints(folder / "one"), stop=STOP)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """Results of two ranks: the only launch of this file."""
    port, paths = free_port(), os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "support.distributed_worker", folder],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    values: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return values


def free_port() -> str:
    """A free port below the ephemeral ones, so that no other process gets it before the ranks listen."""
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("no port between 20000 and 32000 is free")


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Result of the same run in one process."""
    return result(SINGLE_PROCESS)


def close(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Same plan, same losses from the last step backwards."""
    assert first["plan"] == second["plan"]
    for name in ("loss", "valid"):
        pairs = list(zip(reversed(first[name]), reversed(second[name]), strict=False))
        assert pairs
        assert max(abs(a - b) for a, b in pairs) < CLOSE


def test_two_ranks_equal_one_process(results: dict[str, Any], alone: dict[str, Any]) -> None:
    """Batches of 5 and 3 for two ranks: shares are uneven, and every label counts the same."""
    assert len(alone["loss"]) == STEPS
    close(results["ddp"], alone)


def test_sharded_run_with_teacher_equals_one_process(results: dict[str, Any]) -> None:
    """With a teacher, also sharded; the model is cut three times while it is sharded."""
    close(results["fsdp"], result(SINGLE_PROCESS, distil=True))


@pytest.mark.parametrize("name", OTHERS)
def test_other_runs_of_two_ranks_equal_one_process(name: str, results: dict[str, Any]) -> None:
    """With fewer examples than ranks, one of them passes over nothing."""
    close(results[name], result(SINGLE_PROCESS, **OTHERS[name][1]))


def test_packed_passes_of_two_ranks_equal_one_process(results: dict[str, Any]) -> None:
    close(results["packed"], result(SINGLE_PROCESS, **PACKED))


def test_two_ranks_resume_a_run_of_one(results: dict[str, Any], alone: dict[str, Any]) -> None:
    assert len(results["one to two"]["loss"]) < STEPS
    close(results["one to two"], alone)


def test_one_process_resumes_a_run_of_two(results: dict[str, Any], alone: dict[str, Any], folder: Path) -> None:
    assert len(results["two to one"]["loss"]) == STOP
    assert Checkpoints(folder / "two").latest() is not None
    close(result(SINGLE_PROCESS, Checkpoints(folder / "two")), alone)


def test_out_of_memory_on_one_rank_makes_passes_smaller_on_all(results: dict[str, Any]) -> None:
    assert results["micro tokens"] == 16


class FailingPasses:
    """Passes that score 1, or raise an out-of-memory error."""

    def __init__(self, *, full: bool) -> None:
        self.full, self.size = full, PassSize(64, recompute=False)

    def score(self, examples: object, gates: object) -> float:
        if self.full:
            raise torch.OutOfMemoryError("full")
        return 1.0


class OutOfMemoryRanks(Ranks):
    """Two ranks, of which this one runs out of memory in a sum."""

    def any_rank(self, *arguments: Any) -> bool:
        return False

    def all_reduce_sum_(self, tensors: object) -> None:
        raise torch.OutOfMemoryError("full")


@pytest.mark.parametrize(
    ("world", "joined", "error", "waits"),
    [(2, True, LimitBroken, 1), (2, False, LimitBroken, 0), (1, False, LimitBroken, 0), (2, True, ModelError, 0)],
)
def test_broken_limit_is_reported_before_any_rank_ends(
    world: int, joined: bool, error: type[Exception], waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no barrier if the other ranks have ended, nor for an error of one rank alone."""
    waits_of: list[Ranks] = []
    monkeypatch.setattr(Ranks, "barrier", lambda self: waits_of.append(self))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: joined)
    with pytest.raises(error), Ranks(world_size=world).barrier_before_failing():
        raise error
    assert len(waits_of) == waits


@pytest.mark.parametrize("shards", [True, False])
def test_out_of_memory_in_an_exchange_ends_the_run(shards: bool) -> None:
    """No rank repeats the step alone, since the others wait in another exchange."""
    passes: Any = FailingPasses(full=shards)
    several = distribute_passes(passes, None, OutOfMemoryRanks(world_size=2, uses_fsdp=shards))
    with pytest.raises(ModelError, match="out of GPU memory while ranks exchange"):
        StepGuard(several, 0).retry_smaller((), lambda: several.score((), {}), lambda: None)


def test_barrier_waits_for_all_ranks(results: dict[str, Any]) -> None:
    assert results["waits"]


def test_gates_that_differ_between_ranks_end_the_run(results: dict[str, Any]) -> None:
    """The error is raised on every rank, so none continues alone."""
    assert results["differ"].startswith("the gates differ between ranks")


def test_run_of_sharded_ranks_writes_the_folder_of_one_process(results: dict[str, Any], folder: Path) -> None:
    """Rank 0 wrote the folder, layer by layer; one process decides and cuts the same, but for rounding."""
    sharded, single = RunFolder(folder / "run"), RunFolder(folder / "again")
    assert sharded.read_manifest().selfcheck.ok
    assert len(list(sharded.model_folder.glob("*.safetensors"))) == 4  # three layers, and what is outside
    config = from_mapping(
        yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) | {"out": str(single.path)}
    )
    context = prepare(config, resume=False, console=SilentConsole())
    create_run_folder(single, config)
    train(context)
    state = Checkpoints(single.checkpoints).latest()
    assert state is not None
    assert state.plan is not None
    assert state.plan.to_json() == sharded.plan_file.read_text(encoding="utf-8")
    lines = [(folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines() for folder in (single, sharded)]
    losses = [[json.loads(line)["loss"] for line in records] for records in lines]
    assert losses[0] == pytest.approx(losses[1], abs=CLOSE)


# -- without a launch ------------------------------------------------------------------------------------------------


def rows(*lengths: int) -> list[Example]:
    return [Example(tuple(range(length)), 1, str(index)) for index, length in enumerate(lengths)]


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_split_examples_holds_every_example_once(count: int, world: int) -> None:
    examples = rows(*(3 + 7 * index % 11 for index in range(count)))
    shares = Ranks(world_size=world).split_examples(examples)
    assert len(shares) == world
    assert sorted((example for share in shares for example in share), key=lambda e: int(e.id)) == examples
    loads = [sum(len(example.token_ids) for example in share) for share in shares]
    assert max(loads) - min(loads) <= max(len(example.token_ids) for example in examples)


def test_fingerprint_depends_on_order_and_every_bit() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    assert fingerprint([values]) == fingerprint([values.clone()])
    for other in (values.flip(0), values * (1 + 2**-23), torch.tensor([1.0, 2.0, float("nan")])):
        assert fingerprint([values]) != fingerprint([other])


def test_init_distributed_without_a_launch_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert init_distributed(torch.device("cpu")) is SINGLE_PROCESS
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a cluster's job, not of a launcher
    assert rank_and_world_size() == (0, 1)
    assert not is_lost_rank(RuntimeError("Connection closed by peer"))
    assert not single_process_error("compare")


@pytest.mark.parametrize(
    ("device", "changes", "says"),
    [
        ("cuda:1", {}, "is one GPU"),
        ("mps", {}, "need CUDA or the CPU"),
        ("cpu", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ("cpu", {"ACCELERATE_USE_FSDP": "true"}, "--fsdp_version 2"),
        ("cpu", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offload"),
        ("cpu", {"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED"),
    ],
)
def test_unsupported_launch_is_refused(
    device: str, changes: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"} | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says):
        init_distributed(torch.device(device))


def test_other_commands_refuse_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "one process" in single_process_error("compare")
    assert not single_process_error("run")
    assert is_lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3"))
    assert not is_lost_rank(RuntimeError("shapes differ"))


def test_rank_waiting_for_a_lost_one_exits_with_a_message() -> None:
    """The main thread blocks in C, where Python runs no signal handler."""
    program = (
        "import ctypes, os, signal; from prunetune.utils import launch; launch.STOP_GRACE_SECONDS = 0.1\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "def wait():\n"
        "    print('waits', flush=True)\n"
        "    while True: ctypes.CDLL(None).sleep(60)\n"  # the handler runs, and the wait goes on
        "launch.run_and_exit_on_failure(wait)"
    )
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "prunetune: rank 1 of 2: told to stop, as when another rank ends; continue with --resume\n"
