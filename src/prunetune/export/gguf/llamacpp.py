"""The check in llama.cpp itself: next tokens against transformers in float32, and how texts fall into tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunetune.errors import SelfCheckFailed
from prunetune.export.source import ExportSource

STEPS = 16  # greedy tokens
TIE = 1e-3  # the two best logits are nearer to each other than this share of the largest: rounding may turn them
CHECK_TEXTS = (
    "The patient, 47, was given 12.5 mg on 2024-03-01.",
    "  Two  spaces,\ttabs\nand\n\nlines; it's O'Neill's.",
    "def f(x): return x**2  # Größe, naïve, 東京, 🙂",
)

# Both run in processes of their own: llama.cpp ends the process where it cannot go on, and neither model stays here.
REFERENCE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, code, wanted, found = sys.argv[1:]
asked = json.load(open(wanted))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=code == "code").eval()
answers = []
for ids in asked["prompts"]:
    tokens, gaps = [], []
    for _ in range(asked["steps"]):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + tokens]), logits_to_keep=1).logits[0, -1]
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float((best.values[0] - best.values[1]) / logits.abs().max()))
    answers.append({"tokens": tokens, "gaps": gaps})
json.dump(answers, open(found, "w"))
"""
RUNNER = """
import json, sys, urllib.request, xllamacpp
file, wanted, found = sys.argv[1:]
asked = json.load(open(wanted))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = file, asked["context"], 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
server = xllamacpp.Server(params)
def ask(path, **body):
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), kind)
    return json.load(urllib.request.urlopen(request))["tokens"]
said = {
    "next": [ask("/completion", prompt=ids, n_predict=1, temperature=0, return_tokens=True)[0] for ids in asked["ids"]],
    "pieces": [ask("/tokenize", content=text, add_special=False) for text in asked["texts"]],
}
json.dump(said, open(found, "w"))
"""


@dataclass(frozen=True)
class GreedyContinuation:
    """A greedy continuation in transformers."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]  # between the two best logits, as a share of the largest


@dataclass(frozen=True)
class TokenAgreement:
    """What llama.cpp says where transformers was."""

    steps: int
    equal: int
    ties: int  # of the others: the two best logits were all but equal
    texts: int  # of TEXTS, into the same tokens

    @property
    def all_equal(self) -> bool:
        """Whether every token is that of transformers, up to ties."""
        return self.equal + self.ties == self.steps

    def __str__(self) -> str:
        """For a line of results."""
        ties = f", {self.ties} of them ties" if self.ties else ""
        return (
            f"{self.equal} of {self.steps} greedy tokens equal{ties}, "
            f"{self.texts} of {len(CHECK_TEXTS)} texts in the same tokens"
        )


def runtime_version() -> str:
    """llama.cpp and the release of the package that brings it; "" where it is not there."""
    return f"llama.cpp (xllamacpp {version('xllamacpp')})" if find_spec("xllamacpp") else ""


def check_prompts(source: ExportSource) -> list[list[int]]:
    """Two beginnings of texts."""
    return [list(ids[:12]) for ids in source.tokenizer([CHECK_TEXTS[0], CHECK_TEXTS[2]])["input_ids"]]


def reference_continuations(
    source: ExportSource, prompts: Sequence[Sequence[int]], steps: int = STEPS
) -> list[GreedyContinuation]:
    """Greedy continuations of the checkpoint in stock transformers, float32, in a fresh process."""
    code = "code" if source.trusts_code else "plain"
    said = _process(
        REFERENCE, [str(source.folder.absolute()), code], {"prompts": prompts, "steps": steps}, f"{source.folder}"
    )
    return [GreedyContinuation(tuple(answer["tokens"]), tuple(answer["gaps"])) for answer in said]


def compare_tokens(
    file: Path,
    source: ExportSource,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[GreedyContinuation],
    threads: int = 0,
) -> TokenAgreement:
    """Ask llama.cpp for the next token after every beginning of the reference's answers, and for the texts' tokens."""
    ids = [
        [*prompt, *answer.tokens[:step]]
        for prompt, answer in zip(prompts, answers, strict=True)
        for step in range(len(answer.tokens))
    ]
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    asked = {"ids": ids, "texts": CHECK_TEXTS, "context": 8 + max(map(len, ids)), "threads": threads}
    said = _process(RUNNER, [str(file.absolute())], asked, f"{file} in llama.cpp")
    wanted = [token for answer in answers for token in answer.tokens]
    gaps = [gap for answer in answers for gap in answer.gaps]
    differ = [index for index, token in enumerate(said["next"]) if token != wanted[index]]
    pieces = source.tokenizer(list(CHECK_TEXTS), add_special_tokens=False)["input_ids"]
    return TokenAgreement(
        steps=len(wanted),
        equal=len(wanted) - len(differ),
        ties=sum(gaps[index] < TIE for index in differ),
        texts=sum(list(own) == theirs for own, theirs in zip(pieces, said["pieces"], strict=True)),
    )


def _reason(said: str) -> str:
    """The line that says why: llama.cpp's own, which stands before what Python makes of it, or the last error."""
    lines = said.splitlines()
    own = [line.partition("error loading model:")[2] for line in lines if "error loading model:" in line]
    return (own or ([line for line in lines if "error" in line.lower()] or lines or [""])[-1:])[0].strip()


def _process(script: str, arguments: list[str], asked: Any, what: str) -> Any:
    """Run a script that reads and writes JSON; raises `SelfCheckFailed` where it ends badly."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted, found = Path(scratch) / "wanted.json", Path(scratch) / "found.json"
        wanted.write_text(json.dumps(asked))
        done = subprocess.run(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-c", script, *arguments, str(wanted), str(found)],
            capture_output=True, text=True, cwd=scratch, check=False,
            env=os.environ | {"HF_MODULES_CACHE": scratch, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        if not found.is_file():
            raise SelfCheckFailed(f"{what} does not run: {_reason(done.stderr) or done.returncode}")
        return json.loads(found.read_text())
