"""Recipes, flags, data files, model folders, run folders and endpoints' replies of any content, many of each.

    python benchmarks/reliability/fuzz.py [--examples 500] [--out benchmarks/results.jsonl]

They are the fuzzed tests with more examples. An example counts as failed if it ends in an exception that is no
`PrunetuneError` of one line, or takes longer than 10 seconds; the same numbers give the same examples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import give

ROOT = Path(__file__).parents[2]
KINDS = {
    "recipes": "config/test_fuzzed_recipes.py",
    "flags": "cli/test_fuzzed_flags.py",
    "data files": "data/test_fuzzed_files.py",
    "model folders": "model/test_fuzzed_configs.py",
    "run folders": "runs/test_fuzzed_run_folders.py",
    "replies of endpoints": "evaluation/suites/test_fuzzed_replies.py",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--examples", type=int, default=500, help="of each test; a kind has several")
    options.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    is_clean = True
    for kind in given.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "examples.jsonl"
            environment = {"PRUNETUNE_FUZZ_EXAMPLES": str(given.examples), "PRUNETUNE_FUZZ_LOG": str(log)}
            tests = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--import-mode=importlib", "--timeout=7200",
                 "--tb=short", str(ROOT / "tests" / KINDS[kind])],
                cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            examples = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        outcomes = Counter(example["outcome"] for example in examples)
        if tests.returncode:
            is_clean = False
            print("\n".join(line[:300] for line in tests.stdout.splitlines()), file=sys.stderr)
        slowest = max((example["seconds"] for example in examples), default=0.0)
        row = {
            "bar": "N2",
            "case": f"{kind} of any content, {len(examples)}: {outcomes['fine']} work, {outcomes['refused']} refused "
            f"in one line; slowest {slowest:.1f} s",
            "value": outcomes["failed"] + (tests.returncode != 0 and not outcomes["failed"]),
            "target": 0,
            "met": tests.returncode == 0,
            "unit": "tracebacks or over 10 s",
            "device": "cpu",
            "command": f"benchmarks/reliability/fuzz.py --examples {given.examples} --kinds '{kind}'",
        }
        give(row, given.out)
    sys.exit(not is_clean)


if __name__ == "__main__":
    main()
