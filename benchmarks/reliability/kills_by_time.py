"""Kills a run at random moments, goes on with --resume each time, and compares plan and weights to the bit.

    python benchmarks/reliability/kills_by_time.py [--kills 30] [--seed 0] [--steps 400] [--device cpu] [--jobs 1]

The run is whole (teacher, four cuts, all weights, export, evaluation, report), on a small random model made here. A
kill is SIGKILL to the process: a stage is drawn among those that the run has not reached, and up to half a second after
the run got there it is killed; while it scores or cuts, or writes a checkpoint, at once. Runs that end are compared,
and another begins until the kills are used up. On a GPU, runs are `deterministic`: without it bits differ, killed or
not. With `--jobs N`, N runs go on side by side, each with a seed and a share of the kills of its own, beside N
uninterrupted ones, which have to be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.evaluation import characters, speaker

RECIPE = """
model: {folder}/dense
device: {device}
dtype: {dtype}
deterministic: {deterministic}
data: {{train: [{folder}/rows.jsonl], test_share: 0.25, valid_share: 0.2}}
budget: {{keep: 0.6, align: 8}}
train: {{steps: {steps}, batch_size: 4, checkpoint_every: 3, validate_every: 5}}
lora: {{rank: 4, dense_rank: 4}}
search: {{init_batches: 2, batch_size: 4}}
evaluate: {{limit: 5, generate_limit: 2, max_new_tokens: 4}}
"""

STAGES = ("", "before it began", "start", "teacher", "between cuts", "tune", "export", "evaluation")
WRITING, CUTTING = "writing a checkpoint", "at a cut"
LATER = 0.5  # seconds


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=30)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--steps", type=int, default=400, help="tuning steps: the more, the more kills fall into them")
    options.add_argument("--device", default="cpu")
    options.add_argument("--jobs", type=int, default=1, help="runs side by side")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:
        folder = Path(scratch)
        prepare(folder, given.device, given.steps)
        digests = list(pool.map(lambda job: uninterrupted(folder, job), range(given.jobs)))
        print(f"uninterrupted: {sorted({one[:16] for one in digests})}", file=sys.stderr, flush=True)
        found = list(pool.map(lambda job: course(folder, job, given, digests[0]), range(given.jobs)))
    places = sum((each for each, _ in found), Counter[str]())
    same = [one for _, equal in found for one in equal]
    print(json.dumps({
        "kills": sum(places.values()), "runs": len(same), "equal": sum(same), "at": dict(places),
        "uninterrupted": len(digests), "of them equal": digests.count(digests[0]),
    }))  # fmt: skip
    sys.exit(0 if all(same) and len(set(digests)) == 1 else 1)


def uninterrupted(folder: Path, job: int) -> str:
    """What came out."""
    killed(folder, f"whole-{job}", 0, random.Random())
    return digest(folder / f"whole-{job}")


def course(folder: Path, job: int, given: argparse.Namespace, expected: str) -> tuple[Counter[str], list[bool]]:
    """One run after the other until this job's kills are used up: where they fell, and whether each run ended equal."""
    rng, kills = random.Random(f"{given.seed}/{job}"), len(range(job, given.kills, given.jobs))
    places, same = Counter[str](), list[bool]()
    while sum(places.values()) < kills:
        name = f"killed-{job}-{len(same)}"
        found = killed(folder, name, kills - sum(places.values()), rng)
        places += found
        same.append(digest(folder / name) == expected)
        print(f"{name}: {'equal' if same[-1] else 'DIFFERENT'} after {dict(found)}", file=sys.stderr, flush=True)
    return places, same


def prepare(folder: Path, device: str, steps: int) -> None:
    """Model, rows and recipe."""
    speaker().save_pretrained(folder / "dense")
    characters().save_pretrained(folder / "dense")
    rows = [{"prompt": f"Case {n}: ", "choices": ["yes", "no"], "answer": n % 2, "task": "choice"} for n in range(40)]
    rows += [{"prompt": f"Repeat {n}: ", "completion": f"{n} {n}", "task": "open"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dtype, fixed = ("float32", "false") if device == "cpu" else ("bfloat16", "true")
    recipe = RECIPE.format(folder=folder, device=device, dtype=dtype, deterministic=fixed, steps=steps)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")


def command(folder: Path, name: str, *, resume: bool) -> subprocess.Popen[bytes]:
    """The run as a user would start it."""
    words = [sys.executable, "-m", "prunetune.cli", "run", str(folder / "recipe.yaml"), "--out", str(folder / name)]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen([*words, *(["--resume"] if resume else [])], stdout=log, stderr=log)


def killed(folder: Path, name: str, kills: int, rng: random.Random) -> Counter[str]:
    """One run to its end, killed at most so many times on the way; where it stood each time."""
    places, run = Counter[str](), folder / name
    while True:
        targets = ahead_of(stage(run) if places else "") if sum(places.values()) < kills else ()
        process = command(folder, name, resume=(run / "config.yaml").exists())
        if targets and (where := strike(process, run, rng.choice(targets), rng)):
            places[where] += 1
            continue
        if process.wait():
            raise SystemExit(f"{name} ended with {process.returncode}: {(folder / f'{name}.log').read_text()[-2000:]}")
        return places


def ahead_of(where: str) -> tuple[str, ...]:
    """What the run has not reached."""
    left = STAGES[STAGES.index(where) + 1 :] if where in STAGES else STAGES[STAGES.index("between cuts") :]
    return (*left, WRITING, CUTTING) if "between cuts" in left else (*left, WRITING) if "tune" in left else left


def strike(process: subprocess.Popen[bytes], run: Path, target: str, rng: random.Random) -> str:
    """Kill the run at a stage; says where it stood, nothing where it ended before."""
    while process.poll() is None:
        if not (writes(run) if target == WRITING else stage(run) == target):
            time.sleep(0.002)
            continue
        with suppress(subprocess.TimeoutExpired):
            process.wait(0 if target in (WRITING, CUTTING) else rng.uniform(0, LATER))
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        return WRITING if writes(run) else stage(run)
    return ""


def writes(run: Path) -> bool:
    """Whether a checkpoint is not whole yet."""
    return any((run / "checkpoints").glob("*.partial"))


def stage(run: Path) -> str:
    """How far a run has come."""
    if not (run / "config.yaml").exists():
        return "before it began"
    if (run / "model").exists():
        return "evaluation"
    if (run / "model.unchecked").exists() or (run / "plan.json").exists():
        return "export"
    try:
        states = sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial")
        about = json.loads((states[-1] / "state.json").read_text(encoding="utf-8")) if states else None
    except FileNotFoundError:  # an old one, just let go
        return stage(run)
    if about is None:
        return "teacher" if (run / "tuned").exists() else "start"
    cuts = [cut["step"] for cut in about["seen"]["schedule"]["cuts"]]
    if about["step"] in cuts:  # the newest state is from before this cut
        return CUTTING
    return "between cuts" if about["step"] < cuts[-1] else "tune"


def digest(run: Path) -> str:
    """Of the plan and of all weights."""
    files = [run / "plan.json", *sorted((run / "model").glob("*.safetensors"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    main()
