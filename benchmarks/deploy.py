"""C2: which runtimes open a run's model and say what it says, with their releases.

    python benchmarks/deploy.py RUN [RUN ...] [--docs docs/research/runtimes.md] [--python mlx=/venv/bin/python ...]

The reference is the run's checkpoint in stock transformers, float32: 16 greedy tokens after each of two texts. Every
runtime is asked for the next token after each of those 32 beginnings. Runtimes that need packages of their own run in
the Python that --python names for them: transformers4, mlx, and vllm, where this package is installed by
`pip install --no-deps` beside it. What is not there is skipped with its reason. With --docs the table replaces the one
between the two marks of that page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from prunetune.errors import PrunetuneError
from prunetune.export.gguf import llamacpp
from prunetune.export.gguf.architectures import select_architecture
from prunetune.export.gguf.write import verify_tensors, write_gguf
from prunetune.export.onnx import PACKAGES, export_onnx
from prunetune.export.result import ExportOptions
from prunetune.export.source import ExportSource
from prunetune.utils.optional import is_installed

MARKS = ("<!-- measured by benchmarks/deploy.py -->", "<!-- end -->")


class Skipped(Exception):
    """Why a runtime was not tried."""


@dataclass(frozen=True)
class Case:
    """One run, and what its checkpoint says in the reference."""

    source: ExportSource
    prompts: Sequence[Sequence[int]]
    answers: Sequence[llamacpp.GreedyContinuation]
    pythons: Mapping[str, str]  # runtime -> interpreter
    work: Path  # for exports

    @property
    def beginnings(self) -> list[list[int]]:
        """Everything after which a token is asked for."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return [[*prompt, *answer.tokens[:step]] for prompt, answer in pairs for step in range(len(answer.tokens))]

    def counted(self, tokens: Sequence[int]) -> str:
        """How many next tokens are the reference's."""
        wanted = [token for answer in self.answers for token in answer.tokens]
        gaps = [gap for answer in self.answers for gap in answer.gaps]
        differ = [place for place, token in enumerate(tokens) if token != wanted[place]]
        ties = sum(gaps[place] < llamacpp.TIE_MARGIN for place in differ)
        return f"{len(wanted) - len(differ)}/{len(wanted)}" + (f" ({ties} of the others are ties)" if differ else "")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    runtime: str
    opened: str  # what was opened
    found: str


def transformers_5(case: Case) -> Iterator[Row]:
    """The reference itself: how near it is to the gated model was found when the run wrote it."""
    if case.source.run is None:
        raise Skipped("a model folder has no manifest")
    found = json.loads((case.source.run / "manifest.json").read_text(encoding="utf-8"))["selfcheck"]
    how = "folder" if case.source.layout == "uniform" else "folder, trust_remote_code"
    yield Row(f"transformers {transformers.__version__}", how, f"logits within {found['max_relative']:.1e}")


NEXT = """
import json, sys
folder, wanted, found = sys.argv[1:]
asked = json.load(open(wanted))
{body}
json.dump({{"version": version, "next": [best(ids) for ids in asked]}}, open(found, "w"))
"""
IN_TRANSFORMERS = """
import torch, transformers
version = transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
@torch.inference_mode()
def best(ids):
    return int(model(torch.tensor([ids])).logits[0, -1].argmax())
"""
IN_MLX = """
import mlx.core as mx, mlx_lm
version = mlx_lm.__version__
model, _ = mlx_lm.load(folder)
model.set_dtype(mx.float32)
def best(ids):
    return int(model(mx.array([ids]))[0, -1].argmax())
"""
IN_VLLM = """
import os
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "prunetune", "HF_HUB_OFFLINE": "1"}
import vllm
version = vllm.__version__
model = vllm.LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True)
greedy = vllm.SamplingParams(temperature=0, max_tokens=1)
def best(ids):
    return model.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)[0].outputs[0].token_ids[0]
"""


def transformers_4(case: Case) -> Iterator[Row]:
    """The same folder in the last release of transformers 4."""
    if case.source.layout != "uniform":
        raise Skipped("per_layer_config came with transformers 5.14")
    release, tokens = elsewhere(case, "transformers4", IN_TRANSFORMERS)
    yield Row(f"transformers {release}", "folder", case.counted(tokens))


def mlx_lm(case: Case) -> Iterator[Row]:
    """The same folder in mlx-lm, float32."""
    if case.source.layout != "uniform":
        raise Skipped("mlx-lm builds equal layers only")
    release, tokens = elsewhere(case, "mlx", IN_MLX)
    yield Row(f"mlx-lm {release}", "folder", case.counted(tokens))


def llama_cpp(case: Case) -> Iterator[Row]:
    """Exports to GGUF, each type."""
    runtime = llamacpp.runtime_version()
    if not runtime:
        raise Skipped("xllamacpp is not installed")
    try:
        arch = select_architecture(case.source).name
    except PrunetuneError as refused:
        raise Skipped(str(refused).partition(": ")[2]) from refused
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        file = case.work / f"{dtype}.gguf"
        made, _ = write_gguf(case.source, file, dtype)
        verify_tensors(case.source, file, made)
        found = llamacpp.compare_tokens(file, case.source, case.prompts, case.answers)
        ties = f" ({found.ties} of the others are ties)" if found.equal < found.steps else ""
        texts = f"; {found.texts}/{len(llamacpp.CHECK_TEXTS)} texts in the same tokens"
        yield Row(runtime, f"{dtype.upper()}, {arch}", f"{found.equal}/{found.steps}{ties}{texts}")
        file.unlink()


def onnxruntime(case: Case) -> Iterator[Row]:
    """The export to ONNX, float32."""
    if missing := [name for name in PACKAGES if not is_installed(name)]:
        raise Skipped(f"{', '.join(missing)} is not installed")
    import onnxruntime as runtime

    folder = case.work / "onnx"
    done = export_onnx(case.source, folder, ExportOptions())
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = []
    for ids in case.beginnings:
        row = torch.tensor([ids])
        feed = {"input_ids": row.numpy(), "attention_mask": torch.ones_like(row).numpy()}
        tokens.append(int(session.run(["logits"], feed)[0][0, -1].argmax()))
    shutil.rmtree(folder)
    yield Row(f"onnxruntime {runtime.__version__}", "onnx, F32", f"{case.counted(tokens)}; {done.checks[0].detail}")


def vllm(case: Case) -> Iterator[Row]:
    """The same folder in vLLM, float32; a per-layer one without a trust flag, by the entry point."""
    release, tokens = elsewhere(case, "vllm", IN_VLLM)
    yield Row(f"vLLM {release}", "folder, no trust flag", case.counted(tokens))


RUNTIMES: Mapping[str, Callable[[Case], Iterator[Row]]] = {
    "transformers 5": transformers_5,
    "transformers 4": transformers_4,
    "llama.cpp": llama_cpp,
    "onnxruntime": onnxruntime,
    "vLLM": vllm,
    "mlx-lm": mlx_lm,
}


def elsewhere(case: Case, name: str, body: str, folder: Path | None = None) -> tuple[str, list[int]]:
    """The release of a runtime in a Python of its own, and the next token after every beginning.

    `folder`: the model, if it is not the case's own.
    """
    python = case.pythons.get(name)
    if python is None:
        raise Skipped(f"no Python named for it (--python {name}=...)")
    wanted, found = case.work / "wanted.json", case.work / "found.json"
    wanted.write_text(json.dumps(case.beginnings))
    script = NEXT.format(body=body)
    command = [python, "-c", script, str((folder or case.source.folder).absolute()), str(wanted), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not found.is_file():
        raise Skipped(f"failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    said = json.loads(found.read_text())
    found.unlink()
    return said["version"], said["next"]


def table(runs: Sequence[Path], pythons: Mapping[str, str]) -> str:
    """Markdown."""
    lines = ["| model | runtime | what it opened | against transformers, float32 |", "|---|---|---|---|"]
    for run in runs:
        source = ExportSource.open(run)
        prompts = llamacpp.check_prompts(source)
        with tempfile.TemporaryDirectory() as work:
            case = Case(source, prompts, llamacpp.reference_continuations(source, prompts), pythons, Path(work))
            for name, runtime in RUNTIMES.items():
                try:
                    rows = list(runtime(case))
                except Skipped as reason:
                    rows = [Row(name, "–", f"not run: {reason}")]
                for row in rows:
                    lines.append(f"| {source.name} | {row.runtime} | {row.opened} | {row.found} |")
                    print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--python", action="append", default=[], metavar="RUNTIME=PATH")
    options = parser.parse_args()
    made = table(options.runs, dict(named.split("=", 1) for named in options.python))
    made = f"torch {version('torch')}, gguf {version('gguf')}; `python benchmarks/deploy.py`:\n\n{made}"
    if options.docs is None:
        print(made)
        return
    before, _, rest = options.docs.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    options.docs.write_text(f"{before}{MARKS[0]}\n{made}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
