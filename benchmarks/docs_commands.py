"""U3: every shell command of the guides and examples, as a reader would paste it; says which fail.

    python benchmarks/docs_commands.py [PAGE ...] [--fresh] [--work FOLDER] [--results FILE]

A page's commands run from top to bottom in a folder of its own, which holds the clone's recipes, suites and examples.
What the commands name and the page does not make is made for it: rows, a recipe (the page's first one), a suite,
finished runs. A tiny random model stands for the models of the pages, and every run is short (`QUICK`). With --fresh,
they run in a new clone and a new environment, set up by README.md's command for the tests. Without, in this one.

A command that needs a GPU, the hub or another program has its reason in the page, in a comment above its block:

    <!-- not run: needs a GPU -->
    <!-- not run: "--record", "--compile": needs a GPU -->

The first is about the whole block, the second about its commands with one of these texts. They are counted, not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rows import give

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<skip>.+?) -->\n)?^```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAND_IN = "Qwen/Qwen3-0.6B"  # the hub name of the pages, here the folder of a tiny model
HUB_NAMES = (STAND_IN, "HuggingFaceTB/SmolLM2-135M-Instruct")
SHORT = "--train.batch-size=4 --search.init-batches=1 --require.prompt=16 --require.generate=4 --require.runs=2 "
QUICK = {  # flags that a command already has are left out
    "run": f"{SHORT} --train.steps=4 --evaluate.limit=20 --evaluate.drift=false",
    "compare": f"{SHORT} --train.steps=2 --evaluate.limit=10",
    "demo": f"{SHORT} --train.steps=2 --evaluate.limit=10 --evaluate.drift=false --model={STAND_IN}",
}
UNTIL_STOPPED = ("prunetune serve", "prunetune watch", "llama-server")
WORDS = ("billing", "sales", "support")
SUITE = {"tasks": {"routing": {"data": "../heldout.jsonl", "scorer": "accuracy", "limits": {"accuracy": {"min": 0}}}}}


@dataclass(frozen=True)
class Command:
    """A command of a page, as it is pasted, and why it is not run here ("" if it is)."""

    page: Path
    line: str
    skip: str


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page's bash blocks, without comments."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        about, reason = re.findall(r'"([^"]+)"', block["skip"] or ""), (block["skip"] or "").rpartition('": ')[2]
        for text in block["text"].splitlines():
            line = re.sub(r"(^|\s+)#\s.*$", "", text).strip()
            if line:
                skipped = reason and (not about or any(part in line for part in about))
                yield Command(page, line, reason if skipped else "")


def make_rows(folder: Path) -> None:
    """Rows under the names that pages use."""
    rows = [
        {"prompt": f"Ticket {n}: {WORDS[n % 3]} please\nTeam:", "choices": [f" {word}" for word in WORDS],
         "answer": n % 3, "customer": f"c{n // 2}", "task": "triage"}
        for n in range(120)
    ]  # fmt: skip
    texts = [{"text": f"Note {n}. The {WORDS[n % 3]} team answers in {n} hours."} for n in range(40)]
    held = [row | {"prompt": f"Another {row['prompt']}"} for row in rows]
    files = {"tickets.jsonl": rows, "tickets/a.jsonl": rows, "heldout.jsonl": held[:40], "corpus/a.jsonl": texts,
             "general/a.jsonl": [{"text": f"General {text['text']}"} for text in texts]}  # fmt: skip
    for name, lines in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "manual.csv").write_text("prompt,completion\n" + "".join(f"Page {n}:, text {n}\n" for n in range(20)))


def make_model(folder: Path, adapter: Path) -> None:
    """A tiny Qwen3 with the tokenizer and chat template of the demo's model, and a LoRA adapter of it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3Config

    from prunetune.model.loading import load_tokenizer

    tokenizer = load_tokenizer("demo")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=6144, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(adapter)


class Shell:
    """Runs lines in one folder, in the environment under test."""

    def __init__(self, folder: Path, work: Path, environment: dict[str, str]) -> None:
        self.folder, self.work, self.environment = folder, work, environment

    def __call__(self, line: str) -> tuple[int, str]:
        """(exit code, output); a server is stopped after a while, and has then exit code 0."""
        serves = line.startswith(UNTIL_STOPPED)
        process = subprocess.Popen(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=25 if serves else 900)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return (0 if serves else 124), output

    def prepare(self, page: Path, line: str) -> None:
        """Make what the line reads and nothing before it made: a recipe, a suite, finished runs, .gguf files."""
        recipes = [text for text in YAML.findall(page.read_text(encoding="utf-8")) if "\n  train:" in text]
        out = re.search(r"--out (\S+)", line)
        for name in re.findall(r"[\w./-]+\.yaml", line):
            file = self.folder / name
            if file.exists():
                continue
            file.parent.mkdir(exist_ok=True)
            if "suite" in name:
                values: Any = SUITE if "/" in name else {"root": "suites", **SUITE}
            else:
                values = yaml.safe_load(recipes[0]) if recipes else {"data": {"train": "tickets.jsonl"}}
                values = {"model": STAND_IN, "out": f"runs/{file.stem}"} | values
            file.write_text(yaml.safe_dump(values))
        for name in re.findall(r"(?<!\S)runs/[\w-]+", line.replace(out[0], "") if out else line):
            if not (self.folder / name).exists():
                layout = "uniform" if "uniform" in name else "per-layer"
                finished = self.work / layout  # one for all pages and names
                if not finished.exists():
                    run = f"prunetune run --model {self.work}/model --data.train tickets.jsonl {QUICK['run']}"
                    self.make(f"{run} --layout {layout} --out {finished}")
                shutil.copytree(finished, self.folder / name)
        for name in re.findall(r"(?<!\S)[\w-]+\.gguf", line.replace(out[0], "") if out else line):
            if not (self.folder / name).exists():
                self.prepare(page, "runs/gguf")
                self.make(f"prunetune export runs/gguf --to gguf --out {name}")

    def make(self, line: str) -> None:
        code, output = self(line)
        if code:
            raise SystemExit(f"not a command of a page, but it is needed: {line}\n{output}")


def quick(line: str) -> str:
    """The line with flags that make a run short."""
    first = re.match(r"prunetune (run|compare|demo)(?=\s|$)", line)
    if not first or "--resume" in line:
        return line
    flags = QUICK[first[1]].split() + [f"--model={STAND_IN}"] * bool(re.search(r"(recipes|examples)/", line))
    return " ".join([line, *(flag for flag in flags if flag.partition("=")[0] not in line)])


def environment_under_test(work: Path, *, fresh: bool) -> tuple[Path, dict[str, str]]:
    """(clone, environment variables): this one, or a new clone with what README.md's first command installs."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "PRUNETUNE_CACHE": str(work / "cache"), "TERM": "dumb"}
    if not fresh:
        bin_folder = str(Path(sys.executable).parent)
        return ROOT, environment | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    clone = work / "clone"
    if clone.exists():  # of an earlier call with the same --work
        subprocess.run(["git", "fetch", "--quiet"], cwd=clone, check=True)
        subprocess.run(["git", "reset", "--quiet", "--hard", "@{upstream}"], cwd=clone, check=True)
    else:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    *_, set_up = (command.line for command in commands(clone / "README.md") if "venv" in command.line)
    subprocess.run(["bash", "-c", set_up.rpartition(" && ")[0]], cwd=clone, env=environment, check=True)
    return clone, environment | {"PATH": f"{clone}/.venv/bin:{os.environ['PATH']}", "VIRTUAL_ENV": str(clone / ".venv")}


def main() -> None:
    """Run the commands; exits with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--results", type=Path, help="append a row to this file")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="prunetune-docs-"))
    clone, environment = environment_under_test(work, fresh=options.fresh)
    make_model(work / "model", work / "adapter")
    counts = {"run": 0, "failed": 0, "not run": 0}
    for page in [clone / page.resolve().relative_to(ROOT) for page in options.pages or PAGES]:
        folder = work / "pages" / "-".join(page.relative_to(clone).with_suffix("").parts)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("recipes", "examples"):
            (folder / name).symlink_to(clone / name)
        shutil.copytree(clone / "suites", folder / "suites")
        for name in HUB_NAMES:
            (folder / name).parent.mkdir()
            (folder / name).symlink_to(work / "model")
        (folder / "outputs").mkdir()
        (folder / "outputs" / "my-adapter").symlink_to(work / "adapter")
        make_rows(folder)
        shell = Shell(folder, work, environment)
        for command in commands(page):
            shown = f"{page.relative_to(clone)}: {command.line}"
            if command.skip or command.line.startswith(("python3 -m venv", "pip install")):
                counts["not run"] += 1
                print(f"-    {shown}  ({command.skip or 'the set-up: --fresh does it'})", flush=True)
                continue
            shell.prepare(page, command.line)
            started = time.monotonic()
            code, output = shell(quick(command.line))
            if code == 1 and re.search("BROKEN|ended outside a limit", output):  # a verdict on a random model
                code = 0
            counts["run"] += 1
            counts["failed"] += code != 0
            print(f"{'ok' if code == 0 else 'FAIL':4} {shown}  ({time.monotonic() - started:.0f} s)", flush=True)
            if code:
                print(*(f"     {line}" for line in output.strip().splitlines()[-4:]), sep="\n", flush=True)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if options.results:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
        row = {
            "bar": "U3", "case": f"commands of the pages: {counts['run']} run, {counts['not run']} need more",
            "value": counts["failed"], "target": 0, "met": not counts["failed"], "unit": "commands that fail",
            "device": "2 CPU cores", "command": f"benchmarks/docs_commands.py{' --fresh' if options.fresh else ''}",
            "commit": commit.stdout.strip()[:7], "final": False,
        }  # fmt: skip
        give(row, options.results)
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
