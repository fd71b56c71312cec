"""Checks a GGUF file in llama.cpp (xllamacpp): next tokens against transformers in float32, and texts' tokens."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prunetune.errors import SelfCheckFailed
from prunetune.export.source import ExportSource
from prunetune.utils.optional import is_installed

log = logging.getLogger(__name__)
STEPS = 16  # greedy tokens
TIE_MARGIN = 1e-3  # if the two best logits differ by less than this share of the largest, rounding may swap them
CHECK_TEXTS = (
    "The patient, 47, was given 12.5 mg on 2024-03-01.",
    "  Two  spaces,\ttabs\nand\n\nlines; it's O'Neill's.",
    "def f(x): return x**2  # Größe, naïve, 東京, 🙂",
)

# Both run in processes of their own: llama.cpp ends the process on an error, and both models are freed with it.
REFERENCE_SCRIPT = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from prunetune.model.per_layer_classes import register_folder
folder, request_file, answer_file = sys.argv[1:]
request = json.load(open(request_file))
register_folder(Path(folder))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
answers = []
for ids in request["prompts"]:
    tokens, gaps = [], []
    for _ in range(request["steps"]):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + tokens]), logits_to_keep=1).logits[0, -1]
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float((best.values[0] - best.values[1]) / logits.abs().max()))
    answers.append({"tokens": tokens, "gaps": gaps})
json.dump(answers, open(answer_file, "w"))
"""
LLAMACPP_SCRIPT = """
import json, sys, urllib.request, xllamacpp
file, request_file, answer_file = sys.argv[1:]
request = json.load(open(request_file))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = file, request["context"], 0, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
server = xllamacpp.Server(params)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a request to this machine needs no proxy
def post(path, **body):
    headers = {"Content-Type": "application/json"}
    http_request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    return json.load(opener.open(http_request))["tokens"]
options = {"n_predict": 1, "temperature": 0, "return_tokens": True}
answer = {
    "next": [post("/completion", prompt=ids, **options)[0] for ids in request["ids"]],
    "tokens": [post("/tokenize", content=text, add_special=False) for text in request["texts"]],
}
json.dump(answer, open(answer_file, "w"))
"""


@dataclass(frozen=True)
class GreedyContinuation:
    """A greedy continuation in transformers."""

    tokens: tuple[int, ...]
    gaps: tuple[float, ...]  # between the two best logits, as a share of the largest


@dataclass(frozen=True)
class TokenAgreement:
    """How far llama.cpp agrees with transformers."""

    steps: int  # greedy tokens compared
    equal: int
    ties: int  # not equal, but the two best logits were within `TIE_MARGIN`
    texts: int  # of `CHECK_TEXTS`, with the same tokens

    @property
    def all_equal(self) -> bool:
        """Whether every token is equal or a tie."""
        return self.equal + self.ties == self.steps

    def __str__(self) -> str:
        """The agreement as a line of the export's checks."""
        ties = f", {self.ties} of them ties" if self.ties else ""
        return (
            f"{self.equal} of {self.steps} greedy tokens equal{ties}, "
            f"{self.texts} of {len(CHECK_TEXTS)} texts in the same tokens"
        )


def runtime_version() -> str:
    """Name and release of the package that runs llama.cpp; "" if it is not installed."""
    return f"llama.cpp (xllamacpp {version('xllamacpp')})" if is_installed("xllamacpp") else ""


def check_prompts(source: ExportSource) -> list[list[int]]:
    """The token ids of two short prompts."""
    return [list(ids[:12]) for ids in source.tokenizer([CHECK_TEXTS[0], CHECK_TEXTS[2]])["input_ids"]]


def reference_continuations(
    source: ExportSource, prompts: Sequence[Sequence[int]], steps: int = STEPS
) -> list[GreedyContinuation]:
    """Greedy continuations of the checkpoint in stock transformers, float32, in a fresh process."""
    log.info("generating %d tokens with transformers", steps * len(prompts))
    folder = str(source.folder.absolute())
    answers = run_script(REFERENCE_SCRIPT, [folder], {"prompts": prompts, "steps": steps}, f"{source.folder}")
    return [GreedyContinuation(tuple(answer["tokens"]), tuple(answer["gaps"])) for answer in answers]


def compare_tokens(
    file: Path,
    source: ExportSource,
    prompts: Sequence[Sequence[int]],
    references: Sequence[GreedyContinuation],
    threads: int = 0,
) -> TokenAgreement:
    """Compare llama.cpp's next token after every prefix of the references, and its tokens of `CHECK_TEXTS`."""
    log.info("generating them with llama.cpp")
    prefixes = prefixes_of(prompts, references)
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    request = {"ids": prefixes, "texts": CHECK_TEXTS, "context": 8 + max(map(len, prefixes)), "threads": threads}
    answer = run_script(LLAMACPP_SCRIPT, [str(file.absolute())], request, f"{file} in llama.cpp")
    text_tokens = source.tokenizer(list(CHECK_TEXTS), add_special_tokens=False)["input_ids"]
    texts = sum(list(ours) == theirs for ours, theirs in zip(text_tokens, answer["tokens"], strict=True))
    return replace(count_agreement(answer["next"], references), texts=texts)


def prefixes_of(prompts: Sequence[Sequence[int]], references: Sequence[GreedyContinuation]) -> list[list[int]]:
    """Every prompt with every beginning of its continuation, after each of which a token is asked for."""
    return [
        [*prompt, *reference.tokens[:step]]
        for prompt, reference in zip(prompts, references, strict=True)
        for step in range(len(reference.tokens))
    ]


def count_agreement(tokens: Sequence[int], references: Sequence[GreedyContinuation]) -> TokenAgreement:
    """How many of a runtime's next tokens after `prefixes_of` are those of the references; no texts are compared."""
    expected = [token for reference in references for token in reference.tokens]
    gaps = [gap for reference in references for gap in reference.gaps]
    different = [step for step, token in enumerate(tokens) if token != expected[step]]
    return TokenAgreement(
        steps=len(expected),
        equal=len(expected) - len(different),
        ties=sum(gaps[step] < TIE_MARGIN for step in different),
        texts=0,
    )


def _error_line(output: str) -> str:
    """The line of a process's output that says why it failed: llama.cpp's own if there is one, else the last error."""
    lines = output.splitlines()
    own = [line.partition("error loading model:")[2] for line in lines if "error loading model:" in line]
    return (own or ([line for line in lines if "error" in line.lower()] or lines or [""])[-1:])[0].strip()


def run_script(script: str, arguments: list[str], request: Any, name: str) -> Any:
    """Run a script that reads and writes JSON; raises `SelfCheckFailed` if it writes no answer."""
    with tempfile.TemporaryDirectory() as scratch:
        request_file, answer_file = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        request_file.write_text(json.dumps(request))
        process = subprocess.run(  # noqa: S603 - our own interpreter and text
            [sys.executable, "-P", "-c", script, *arguments, str(request_file), str(answer_file)],
            capture_output=True, text=True, cwd=scratch, check=False,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        if not answer_file.is_file():
            raise SelfCheckFailed(f"{name} does not run: {_error_line(process.stderr) or process.returncode}")
        return json.loads(answer_file.read_text())
