"""`prunetune bench` on models: names, processes, both runtimes, and the command."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from prunetune.bench import clock
from prunetune.bench.llamacpp import LlamaCppRunner, gguf_context_length
from prunetune.bench.local import ATTENTION, LocalRunner, decode_bytes
from prunetune.bench.models import ModelSpec, resolve_models
from prunetune.bench.options import BenchOptions
from prunetune.bench.runner_protocol import OutOfMemory
from prunetune.bench.worker import Worker
from prunetune.errors import ConfigError, MissingPackage, ModelError
from prunetune.export.formats import export_run
from support import bench as bench_helpers
from support.data import subwords
from support.evaluation import characters
from support.export import run_folder
from support.models import HYBRIDS, hybrid
from support.suites import model_folder

SMALL = BenchOptions(prompt=12, generate=4, batch="1,2", runs=2, device="cpu", dtype="float32")
Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    """A per-layer run whose recipe names `dense` as its model."""
    folder = run_folder(tmp_path_factory.mktemp("runs") / "support", subwords())[0]
    (folder / "config.yaml").write_text(f"model: {dense}\nlayout: per-layer\n", encoding="utf-8")
    return folder


# -- names -----------------------------------------------------------------------------------------------------------


def test_dense_model_of_a_run_is_measured_first(run: Path, dense: Path) -> None:
    specs = resolve_models([str(run)], SMALL)
    assert [spec.label for spec in specs] == [f"{dense} (dense)", str(run)]
    assert [spec.trust_remote_code for spec in specs] == [False, False]
    assert [spec.label for spec in resolve_models([str(run)], BenchOptions(prompt=12, generate=4, dense=False))] == [
        str(run)
    ]


def test_every_model_is_measured_once(run: Path, dense: Path) -> None:
    specs = resolve_models([str(run), str(run), str(dense)], SMALL)
    assert [spec.source for spec in specs] == [str(dense), str(run / "model")]


def test_unknown_and_unreadable_models_are_refused(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, says in {
        str(tmp_path / "none"): "not a model folder",
        str(tmp_path): "no config.json",
        "http://user:hunter2@host/v1": "^(?!.*hunter2).*an address is no model: only eval and check ask endpoints",
        str(tmp_path / "a.gguf"): "no such file",
    }.items():
        with pytest.raises(ModelError, match=says):
            resolve_models([name], SMALL)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("model: x\n", encoding="utf-8")
    with pytest.raises(ModelError, match="no model yet"):
        resolve_models([str(unfinished)], SMALL)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve_models([str(tmp_path / "a.gguf")], SMALL)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingPackage, match="pip install 'xllamacpp>="):
        resolve_models([str(tmp_path / "a.gguf")], SMALL)


def test_prompt_beyond_the_context_is_refused(dense: Path) -> None:
    assert resolve_models([str(dense)], BenchOptions(prompt=250, generate=6))
    with pytest.raises(ConfigError, match="make 257 tokens, its context has 256"):
        resolve_models([str(dense)], BenchOptions(prompt=251, generate=6))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_flops_count_keys_for_each_query_head(heads: int) -> None:
    """Against PyTorch's own count of the two matrix products."""
    query, key, value = (
        torch.empty(3, *shape, device="meta", dtype=torch.bfloat16)
        for shape in ((8, 5, 4), (heads, 7, 4), (heads, 7, 6))
    )
    with FlopCounterMode(display=False) as products:
        apart = (
            torch.empty(24, *tensor.shape[2:], device="meta", dtype=tensor.dtype) for tensor in (query, key, value)
        )
        query_apart, key_apart, value_apart = apart
        torch.bmm(torch.bmm(query_apart, key_apart.mT), value_apart)
    for operation, formula in ATTENTION.items():
        assert formula(query.shape, key.shape, value.shape) == products.get_total_flops(), operation


# -- transformers ----------------------------------------------------------------------------------------------------


def test_local_runner_counts_and_times_a_model(dense: Path) -> None:
    runner = LocalRunner(ModelSpec("dense", str(dense)), SMALL)
    single, double = runner.warm_up(1), runner.warm_up(2)
    assert single.prefill_flops
    assert double.prefill_flops == 2 * single.prefill_flops
    weights = sum(weight.nbytes for weight in runner.model.parameters())
    table = runner.model.get_input_embeddings().weight.nbytes
    config = runner.model.config
    entry = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    written = SMALL.prompt + SMALL.generate - 1
    assert (single.decode_bytes, double.decode_bytes) == tuple(weights - table + b * written * entry for b in (1, 2))
    sample = runner.run(2)
    assert sample.total_s == pytest.approx(sample.prefill_s + 3 * sample.decode_s)
    assert sample.joules is None
    facts = runner.facts()
    assert facts.parameters == sum(weight.numel() for weight in runner.model.parameters())
    assert facts.file_bytes == (dense / "model.safetensors").stat().st_size
    assert facts.dtype == "float32"


def test_decode_bytes_include_a_tied_table_and_are_none_for_mixtures(tmp_path: Path) -> None:
    tied = LocalRunner(ModelSpec("tied", str(model_folder(tmp_path / "tied", tie_word_embeddings=True))), SMALL)
    cache = tied._run(1)[1]
    weights = sum(weight.nbytes for weight in tied.model.parameters())
    cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert tied.warm_up(1).decode_bytes == weights + cached
    mixed = LocalRunner(ModelSpec("mixed", str(model_folder(tmp_path / "mixed", family="mixtral"))), SMALL)
    assert mixed.warm_up(1).decode_bytes is None


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_are_timed_with_all_that_their_caches_hold(family: str, tmp_path: Path) -> None:
    vocabulary = len(characters())
    hybrid(family, vocab_size=vocabulary).save_pretrained(tmp_path)
    characters().save_pretrained(tmp_path)
    runner = LocalRunner(ModelSpec(family, str(tmp_path)), SMALL)
    small, large = runner.warm_up(1), runner.warm_up(3)
    assert runner.run(1).total_s > 0
    if family == "qwen3_next":  # a mixture
        assert small.decode_bytes is None
        return
    weights = decode_bytes(runner.model, DynamicCache())
    assert large.decode_bytes - weights == 3 * (small.decode_bytes - weights) > 0


COMPILED = dataclasses.replace(SMALL, compile=True)


def test_compiled_steps_use_the_same_cache_again(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps its address; with another one, the timed runs would compile again."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    runner = LocalRunner(ModelSpec("dense", str(dense)), COMPILED)
    runner.warm_up(2)
    where = [runner._run(2)[1].layers[0].keys.data_ptr() for _ in range(2)]
    assert where[0] == where[1]
    assert runner.facts().runtime.endswith(", compiled")


def test_failed_compilation_is_an_error_with_its_reason(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ValueError("no compiler\nmore")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=failing))
    runner = LocalRunner(ModelSpec("dense", str(dense)), COMPILED)
    reason = r"model dense: cannot be compiled here \(ValueError: no compiler\); leave --compile out"
    with pytest.raises(ModelError, match=reason):
        runner.warm_up(1)


def test_out_of_memory_names_batch_and_model(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = LocalRunner(ModelSpec("dense", str(dense)), SMALL)

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(runner, "prefill", full)
    monkeypatch.setattr(runner, "_tokens", lambda _: torch.ones(1, 1))
    monkeypatch.setattr(runner, "_cache", lambda _: None)
    with pytest.raises(OutOfMemory, match="batch 2 of dense: out of memory"):
        runner.run(2)


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no mark to reset")
def test_peak_memory_is_that_since_the_reset() -> None:
    cpu = torch.device("cpu")
    if not clock.reset_peak_memory(cpu):
        pytest.skip("the system forbids to reset the mark")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    peak = clock.peak_bytes(cpu)
    del block
    assert clock.reset_peak_memory(cpu)
    assert peak - clock.peak_bytes(cpu) > 32 << 20


def test_energy_meter_is_none_on_a_cpu() -> None:
    assert clock.energy_meter(torch.device("cpu")) is None


# -- processes -------------------------------------------------------------------------------------------------------


def test_worker_survives_out_of_memory_and_its_exit_is_an_error() -> None:
    worker = Worker(ModelSpec("m", "m"), SMALL, bench_helpers.unstable_runner)
    assert worker.facts() == bench_helpers.facts()
    assert worker.run(1).total_s == 1.0
    with pytest.raises(OutOfMemory, match="batch 5 of m"):
        worker.run(5)
    assert worker.run(4).total_s == 1.0  # the model is still open
    with pytest.raises(ModelError, match=r"model m: its process ended at batch 2 \(exit code 7"):
        worker.run(2)
    worker.close()
    worker.close()


SCRIPT = """
import sys
from prunetune import measure_models
from prunetune.bench.options import BenchOptions
found = measure_models([sys.argv[1]], BenchOptions(batch="1", prompt=8, generate=2, runs=1, device="cpu"))
print(found.models[1].cells[0].ratios["decode"].median)
"""


def test_script_without_main_guard_can_measure(run: Path, tmp_path: Path) -> None:
    """As in docs/guides/bench.md: starting a worker does not run the script again."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py", run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


def test_bug_has_a_traceback_and_an_error_one_line() -> None:
    worker = Worker(ModelSpec("m", "m"), SMALL, bench_helpers.unstable_runner)
    with pytest.raises(RuntimeError, match=r"(?s)in the process of m.*ZeroDivisionError: a bug"):
        worker.run(3)
    worker.close()
    with pytest.raises(ModelError, match=r"^model m: no weights$"):
        Worker(ModelSpec("m", "m"), SMALL, bench_helpers.failing_runner)


# -- llama.cpp -------------------------------------------------------------------------------------------------------


def test_llama_cpp_runner_counts_and_times_a_file(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    file = tmp_path / "a.gguf"
    export_run(run, "gguf", out=file)
    assert gguf_context_length(file) == 128
    runner = LlamaCppRunner(ModelSpec("a", str(file), llama_cpp=True), SMALL)
    work = runner.warm_up(1)
    assert runner.warm_up(2).prefill_flops == 2 * (work.prefill_flops or 0) > 0
    assert 0 < (work.decode_bytes or 0) < file.stat().st_size
    single, double = runner.run(1), runner.run(2)
    assert single.prefill_s
    assert single.decode_s
    assert (double.prefill_s, double.decode_s) == (None, None)
    facts = runner.facts()
    assert facts.dtype == "f16"
    assert facts.file_bytes == file.stat().st_size
    assert facts.parameters == LocalRunner(ModelSpec("run", str(run / "model")), SMALL).facts().parameters


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def say(say: Said) -> Said:
    """`prunetune bench` with these arguments."""
    return lambda *arguments: say("bench", *arguments)


def test_command_measures_a_run_and_its_dense_model(say: Said, run: Path, tmp_path: Path) -> None:
    where = tmp_path / "bench.json"
    short = ("--prompt", "12", "--generate", "4", "--batch", "2", "--runs", "2", "--device", "cpu", "--threads", "1")
    code, out, _ = say(str(run), *short, "--json", str(where))
    assert code == 0
    assert f"[1] {run}" in out
    result = json.loads(where.read_text(encoding="utf-8"))
    assert [len(model["cells"][0]["samples"]) for model in result["models"]] == [2, 2]
    assert set(result["models"][1]["cells"][0]["counted"]) == {"prefill", "decode"}
    assert result["models"][1]["facts"]["device"].startswith("1 CPU threads")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "bench needs a model"),
        (("--batch", "0"), "batch '0'"),
        (("--runs", "0"), "runs"),
        (("--generate", "1"), "generate"),
        (("--prompt", "9999"), "its context has 256"),
        (("--device", "tpu"), "'tpu'"),
        (("--json", "/nowhere/at/all.json"), "--json"),
        (("--dtype", "int3"), "int3"),
    ],
)
def test_wrong_arguments_exit_with_two_and_one_line(
    arguments: tuple[str, ...], message: str, say: Said, dense: Path
) -> None:
    code, out, err = say(*((str(dense),) if arguments else ()), *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
