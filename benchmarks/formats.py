"""S1: every format that `export` writes: written, opened in its stock runtime, 32 tokens, eval, bench and check.

    python benchmarks/formats.py RUN ... [--python mlx=/venv/bin/python] [--docs PAGE] [--results FILE]

Tokens: the run's checkpoint in stock transformers, float32, continues two texts greedily by 16 tokens each. The runtime
gives the next token after each of these 32 beginnings. A token counts as equal, or as within the format's own error: in
transformers, with the same rounded weights, its logit is no further below the best than rounding moved any logit there,
or than a tie (a thousandth of the largest logit).
Modelfile: it is beside the .gguf file, with a template or the reason why it has none.

    python benchmarks/formats.py RUN [RUN ...] --held-out 'legal/*/test.jsonl' [--only "gguf q4_k_m"] [--results FILE]

Instead: how far each of llama.cpp's mixes moves the next tokens of the float32 model (mean KL divergence), with the
importance matrix that `export` takes from the run's data and without one, on 32 rows of these files, spread evenly, 512
tokens of each at most. No row of them may be the run's own. The demo's model comes in Q4_1, a grid of 16 values in a
block, on which Q5_1 can be exact: --dither Q4_1 adds noise of one step, so that weights are continuous as before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from deploy import IN_MLX, Case, Skipped, elsewhere
from rows import give
from torch import Tensor

from prunetune.bench.measure_models import measure_in_process
from prunetune.bench.options import BenchOptions
from prunetune.config.recipe import DataConfig
from prunetune.data.encoding import encode
from prunetune.data.sources import read_records
from prunetune.errors import PrunetuneError
from prunetune.evaluation.suites.evaluate_and_check import check, evaluate
from prunetune.evaluation.suites.http_client import EndpointClient
from prunetune.evaluation.suites.llamacpp import start_server
from prunetune.evaluation.suites.options import CheckOptions
from prunetune.export.checkpoint import WrittenCheckpoint
from prunetune.export.formats import export_run
from prunetune.export.gguf import llamacpp
from prunetune.export.gguf.importance import NO_IMPORTANCE, measure_importance
from prunetune.export.gguf.tensors import MIXES, rounded_as_stored
from prunetune.export.quantize import linears_but_head, rounded_as_quantized
from prunetune.export.result import ExportOptions
from prunetune.export.selfcheck import FreshReader
from prunetune.export.source import ExportSource
from prunetune.utils.environment import installed_commit
from prunetune.utils.json_lines import write_json_lines

MARKS = ("<!-- measured by benchmarks/formats.py -->", "<!-- end of formats -->")
COLUMNS = ("format", "export", "opened in", "32 tokens", "eval", "bench", "check", "Modelfile")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", *MIXES)
SUITE = {
    "defaults": {"template": "raw"},
    "tasks": {
        "picked": {"data": "picked.jsonl", "scorer": "accuracy"},
        "written": {"data": "written.jsonl", "scorer": "rouge", "max_new_tokens": 8},
    },
}
HELD_OUT_ROWS = 32
PLACES = ["heart", "head", "lung"]


@dataclass(frozen=True)
class Format:
    """One way to export a run."""

    name: str
    to: str
    options: ExportOptions
    rounded: Callable[[Any], Any] | None  # the model with the weights that the format holds; None: as they are


def formats_of(source: ExportSource) -> list[Format]:
    """The layout's own folder, its quantised forms, ONNX, and every type of GGUF."""
    importance = measure_importance(source, ExportOptions.imatrix_tokens)
    return [
        Format(source.layout, source.layout, ExportOptions(), None),
        Format("onnx", "onnx", ExportOptions(), None),
        Format("mlx", "mlx", ExportOptions(dtype="f32"), None),
        *(
            Format(
                name, "", ExportOptions(quantize=name), lambda model, name=name: rounded_as_quantized(model, name)[0]
            )
            for name in ("int8", "int4")
        ),
        *(
            Format(
                f"gguf {kind}",
                "gguf",
                ExportOptions(dtype=kind),
                lambda model, kind=kind: rounded_as_stored(model, kind, importance)[0],
            )
            for kind in GGUF_TYPES
        ),
    ]


def next_tokens(path: Path, made: Format, case: Case, tokens: Tensor, start: int) -> tuple[str, list[int]]:
    """The runtime, and its token after every beginning; `tokens` [2, T] holds all beginnings of `start` or more."""
    if made.to == "mlx":
        release, found = elsewhere(case, "mlx", IN_MLX, path)
        return f"mlx-lm {release}", found
    if made.to == "gguf":
        server = start_server(path, context=256, on_cpu=True)
        client = EndpointClient(server.listening_address, timeout=600, concurrency=1)
        asked = {"n_predict": 1, "temperature": 0, "return_tokens": True}
        found = [client.post("/completion", {"prompt": ids, **asked})["tokens"][0] for ids in case.beginnings]
        return llamacpp.runtime_version(), [int(token) for token in found]
    if made.to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
        feed = {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
        logits, runtime = torch.from_numpy(session.run(["logits"], feed)[0]), f"onnxruntime {onnxruntime.__version__}"
    else:
        written = WrittenCheckpoint(path, "", case.source.layout, case.source.layout == "per-layer", 0, 0)
        with FreshReader() as reader:
            logits, runtime = reader.read(written, tokens)["logits"], "transformers, a fresh process"
    return runtime, logits[:, start - 1 :].argmax(-1).flatten().tolist()


def measure(source: ExportSource, made: Format, case: Case, suite: Path) -> dict[str, str]:
    """One row of the table; a cell that failed says why."""
    row, path = dict.fromkeys(COLUMNS, "–"), case.work / made.name.replace(" ", "-").replace(",", "")
    path = path.with_suffix(".gguf") if made.to == "gguf" else path
    row["format"] = made.name
    try:
        exported = export_run(source.run or source.folder, made.to, out=path, options=made.options)
    except PrunetuneError as refused:
        return row | {"export": f"not written: {str(refused).partition(': ')[2] or refused}"}
    row["export"] = f"{exported.bytes / 1e6:,.1f} MB"
    if made.to == "gguf":
        text = path.with_suffix(".Modelfile").read_text(encoding="utf-8")
        row["Modelfile"] = "with template" if "\nTEMPLATE" in text else "template not known"
    prompts = torch.tensor(case.prompts)
    answers = torch.tensor([answer.tokens for answer in case.answers])
    tokens = torch.cat([prompts, answers[:, :-1]], dim=1)
    try:
        row["opened in"], found = next_tokens(path, made, case, tokens, prompts.shape[1])
    except Skipped as reason:
        return row | {"opened in": f"not run: {reason}"}
    expected = answers.flatten().tolist()
    model = source.load_model()
    with torch.inference_mode():
        exact = model(tokens).logits[:, prompts.shape[1] - 1 :].flatten(0, 1)
        rounded = made.rounded(model)(tokens).logits[:, prompts.shape[1] - 1 :].flatten(0, 1) if made.rounded else exact
    error = float((rounded - exact).abs().max())
    equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
    below = [float(logits.max() - logits[token]) for logits, token in zip(rounded, found, strict=True)]
    margin = max(error, llamacpp.TIE_MARGIN * float(exact.abs().max()))  # or a tie, as the export itself counts it
    within = sum(ours != theirs and gap <= margin for ours, theirs, gap in zip(found, expected, below, strict=True))
    row["32 tokens"] = f"{equal} equal" + (f", {within} within its error" if equal < len(expected) else "")
    if made.to == "mlx":  # of a per-layer model only mlx-lm opens it; the folder of a uniform one is in the first row
        return row
    options = CheckOptions(device="cpu", dtype="float32", cache=False)
    scores = evaluate(str(path), suite, options=options)
    row["eval"] = next((result.error for result in scores.tasks.values() if result.error), "") or "yes"
    bench = BenchOptions(prompt=16, generate=4, batch="1", runs=2, device="cpu", dense=False)
    row["bench"] = "yes" if measure_in_process([str(path)], bench).models else "no"
    result = check(str(path), suite, options=replace(options, against=str(source.folder)))
    row["check"] = next(iter(result.errors.values()), "") if result.errors else "yes"
    return row


@torch.inference_mode()
def divergences(
    source: ExportSource, held_out: str, mixes: Sequence[str], results: Path | None, *, dither: bool
) -> None:
    """Print or append a row for each mix: KL without an importance matrix over KL with it."""
    records = read_records([held_out], DataConfig(), "test")
    records = records[:: max(1, len(records) // HELD_OUT_ROWS)][:HELD_OUT_ROWS]
    rows = [row.token_ids[:512] for row in encode(records, source.tokenizer, DataConfig(), 2**20).examples]
    importance = measure_importance(source, ExportOptions.imatrix_tokens)
    model, tokens = source.load_model(), sum(map(len, rows))
    torch.manual_seed(0)
    for linear in linears_but_head(model).values() if dither else ():
        for block in linear.weight.split(32, dim=1):  # its least and largest are the first and the last of 16 values
            steps = (block.amax(1, keepdim=True) - block.amin(1, keepdim=True)) / 15
            block += (torch.rand_like(block) - 0.5) * steps
    name = source.name + ", dithered" * dither
    for mix in mixes:
        rounded = [rounded_as_stored(model, mix, matrix)[0] for matrix in (NO_IMPORTANCE, importance)]
        kl = [0.0, 0.0]
        for ids in rows:
            exact, *others = (each(torch.tensor([ids])).logits[0].log_softmax(-1) for each in (model, *rounded))
            kl = [
                mean + float((exact.exp() * (exact - own)).sum()) / tokens for mean, own in zip(kl, others, strict=True)
            ]
        row = {
            "bar": "S1", "case": f"{name}: KL of gguf {mix} from float32, {tokens:,} tokens of {len(rows)} "
            f"held-out rows: {kl[0]:.5f} without, {kl[1]:.5f} with the {importance.note}",
            "value": round(kl[0] / kl[1], 3), "target": ">= 1", "met": kl[1] <= kl[0], "unit": "x",
            "device": "2 cores of a CPU", "command": "python benchmarks/formats.py RUN --held-out ROWS",
            "commit": installed_commit() or "", "final": True,
        }  # fmt: skip
        give(row, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--python", action="append", default=[], metavar="RUNTIME=PATH")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--only", nargs="+", metavar="FORMAT", help="names in the first column, such as 'gguf f16'")
    parser.add_argument("--results", type=Path, help="append a row for bar S1")
    parser.add_argument("--held-out", help="measure what the importance matrix gives on these rows instead")
    parser.add_argument("--dither", choices=["Q4_1"])
    asked = parser.parse_args()
    torch.set_num_threads(1)  # llama.cpp's threads wait for each other, which takes long where cores are shared
    lines, good, cells = [], 0, 0
    for run in asked.runs:
        source = ExportSource.open(run)
        if asked.held_out:
            mixes = [mix for mix in MIXES if not asked.only or f"gguf {mix}" in asked.only]
            divergences(source, asked.held_out, mixes, asked.results, dither=asked.dither == "Q4_1")
            continue
        prompts = llamacpp.check_prompts(source)
        shortest = min(map(len, prompts))
        prompts = [ids[:shortest] for ids in prompts]
        lines += [f"{source.name}, {source.params / 1e6:,.1f} M parameters, layout {source.layout}:", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        with tempfile.TemporaryDirectory() as work:
            suite = Path(work) / "suite.yaml"
            suite.write_text(yaml.safe_dump(SUITE))
            picked = [{"prompt": f"Case {n}: ", "choices": PLACES, "answer": n % 3, "id": f"p{n}"} for n in range(3)]
            written = [{"prompt": f"Case {n}: ", "completion": PLACES[n % 3], "id": f"w{n}"} for n in range(3)]
            write_json_lines(Path(work) / "picked.jsonl", picked)
            write_json_lines(Path(work) / "written.jsonl", written)
            references = llamacpp.reference_continuations(source, prompts)
            case = Case(source, prompts, references, dict(named.split("=", 1) for named in asked.python), Path(work))
            for made in (made for made in formats_of(source) if not asked.only or made.name in asked.only):
                row = measure(source, made, case, suite)
                lines.append(f"| {' | '.join(row[column] for column in COLUMNS)} |")
                print(lines[-1], file=sys.stderr, flush=True)
                counted = [int(word.split()[0]) for word in row["32 tokens"].split(", ") if word[0].isdigit()]
                good += sum(counted) == 32 and all(row[name] == "yes" for name in ("eval", "bench", "check"))
                cells += not row["export"].startswith("not written") and made.to != "mlx"
        lines.append("")
    if asked.held_out:
        return
    table = "\n".join(lines)
    if asked.docs is None:
        print(table)
    else:
        before, _, rest = asked.docs.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        asked.docs.write_text(f"{before}{MARKS[0]}\n{table}{MARKS[1]}{after}", encoding="utf-8")
    row = {
        "bar": "S1", "case": "formats written: 32 tokens equal or within the format's own error, eval, bench and check",
        "value": good, "target": cells, "met": good == cells, "unit": "formats", "device": "2 cores of a CPU",
        "command": "python benchmarks/formats.py RUN ...", "commit": installed_commit() or "", "final": True,
    }  # fmt: skip
    give(row, asked.results)


if __name__ == "__main__":
    main()
