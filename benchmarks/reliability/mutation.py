"""Which small faults would the tests miss (bar N5)? One operator, number or condition of a core module is changed at a
time, and the tests that judge this module are run: they should fail, or not end.

    pip install cosmic-ray      # makes the changes; not needed by the package
    python benchmarks/reliability/mutation.py --share 0.05 --seed 0 --found mutants.jsonl --minutes 30
    python benchmarks/reliability/mutation.py --found mutants.jsonl --minutes 0 --out benchmarks/results.jsonl

A mutant takes about 10 seconds on one core. `--share` of all mutants are drawn, by their names and the seed alone, so
that the same command goes on where it ended. Mutants that survived are tried again, since tests may have been added.
What is found is appended to a file outside the repository, and summed up at the end. Text of messages is not mutated,
nor is what is no behaviour: `strict=` of a `zip`, `indent=` of JSON, the star of a parameter list.

Mutants that change nothing that a test could see are listed with reasons in mutation_equivalent.yaml, and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import parso
import pytest
import yaml
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from rows import give  # noqa: E402

# Module of the package -> test files that judge it: the one that mirrors it, then others that mutants have to survive.
MODULES = {
    "cost/budget_limits": ["cost/test_budget_limits", "search/test_feasibility"],
    "cost/latency_table": ["cost/test_latency_table", "bench/latency/test_measure", "search/test_feasibility"],
    "data/splits": ["data/test_splits"],
    "evaluation/likelihood": ["evaluation/test_likelihood"],
    "evaluation/paired": ["evaluation/test_paired"],
    "evaluation/suites/check": ["evaluation/suites/test_check"],
    "export/checkpoint": ["export/test_checkpoint", "export/test_stock_config"],
    "export/selfcheck": ["export/test_selfcheck", "export/test_checkpoint"],
    "pipeline/finish": ["pipeline/test_finish", "pipeline/test_stages"],
    "pipeline/monitor": ["pipeline/test_monitor", "pipeline/test_limits"],
    "pipeline/requirements": ["pipeline/test_requirements"],
    "search/searcher": ["search/test_searcher", "search/test_feasibility"],
    "search/select": [
        "search/test_select",
        "search/test_searcher",
        "search/test_feasibility",
        "search/test_nested_sites",
    ],
    "train/schedule": ["train/test_schedule", "train/test_quality", "train/test_multi_size"],
}


class NameReplacer(Operator):
    """A name becomes its counterpart."""

    PAIRS: ClassVar = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}

    def mutation_positions(self, node):
        if isinstance(node, parso.python.tree.Name) and node.value in self.PAIRS:
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        return parso.python.tree.Name(self.PAIRS[node.value], node.start_pos, prefix=node.prefix)

    @classmethod
    def examples(cls):
        return ()


SWAPS = {
    "BinaryOperator": ["Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Mod_Mul", "Pow_Mul"],
    "ComparisonOperator": ["Eq_NotEq", "NotEq_Eq", "Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Is_IsNot", "IsNot_Is"],
    "UnaryOperator": ["Delete_USub", "Delete_Not"],
}
NAMES = [f"Replace{kind}_{swap}" for kind, swaps in SWAPS.items() for swap in swaps] + [
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop",
]  # fmt: skip
OPERATORS = {name: get_operator(f"core/{name}")() for name in NAMES} | {"NameReplacer": NameReplacer()}


@dataclass(frozen=True)
class Mutant:
    """A changed line of a module."""

    module: str
    operator: str
    line: int
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What stays the same when lines are added above."""
        return self.module, self.before, self.after


def mutants(module: str, share: float, seed: int) -> Iterator[tuple[Mutant, str]]:
    """A share of the module's mutants, each with the module's changed source."""
    source = (ROOT / f"src/prunetune/{module}.py").read_text(encoding="utf-8")
    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in OPERATORS.items():
        places = [(node, position) for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (node, _) in enumerate(places):
            if node.search_ancestor("fstring") or is_no_behaviour(node):
                continue
            if random.Random(f"{seed} {module} {name} {occurrence}").random() >= share:
                continue
            changed = mutate_code(source, operator, occurrence)
            pairs = zip(source.splitlines(), changed.splitlines(), strict=True)
            line, before, after = next((n, a.strip(), b.strip()) for n, (a, b) in enumerate(pairs, 1) if a != b)
            yield Mutant(module, name, line, before, after), changed


def is_no_behaviour(node: Any) -> bool:
    """Whether it is `strict=` of a `zip`, `indent=` of JSON, or the star of a parameter list."""
    argument = node.search_ancestor("argument")
    if argument is not None and argument.children[0].type == "name":
        return argument.children[0].value in ("strict", "indent")
    return node.parent is not None and node.parent.type in ("parameters", "param")


def passes(tree: Path, files: tuple[str, ...], timeout: float) -> bool | None:
    """Whether these tests pass with the package in `tree`, in a fork of this process; None after the timeout."""
    pid = os.fork()
    if not pid:
        code: int = 70
        try:
            code = run_tests(tree, files)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    ends = time.monotonic() + timeout
    try:
        while time.monotonic() < ends:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pid = 0
                return status == 0
            time.sleep(0.05)
        return None
    finally:  # also if this run is ended
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_tests(tree: Path, files: tuple[str, ...]) -> int:
    """Run test files on the package in `tree`; returns pytest's exit code, and leaves what it prints beside."""
    os.setpgid(0, 0)
    os.chdir(ROOT)
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    printed = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    options = [
        "-x",
        "-q",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "addopts=",
    ]
    return pytest.main([*options, f"--basetemp={tree / 'temporary'}", "--import-mode=importlib", *files])


def survives(mutant: Mutant, changed: str, tree: Path, timeouts: dict[tuple[str, ...], float]) -> bool:
    """Whether the module's tests pass all the same: first those of the file that mirrors it, then the others.

    `timeouts`: of the files that were seen to pass without a mutant.
    """
    path = tree / f"prunetune/{mutant.module}.py"
    original = path.read_text(encoding="utf-8")
    names = tuple(f"tests/{name}.py" for name in MODULES[mutant.module])
    for files in filter(None, (names[:1], names[1:])):
        if files not in timeouts:
            begun = time.monotonic()
            if not passes(tree, files, 900):
                sys.exit(f"{files} fail without a mutant:\n{(tree / 'output.txt').read_text()}")
            timeouts[files] = 20 + 3 * (time.monotonic() - begun)
        path.write_text(changed, encoding="utf-8")
        try:
            if not passes(tree, files, timeouts[files]):
                return False
        finally:
            path.write_text(original, encoding="utf-8")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.05, help="share of all mutants that are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", default=list(MODULES), help="such as search/select")
    parser.add_argument("--minutes", type=float, default=30, help="no mutant is begun after so many")
    parser.add_argument("--found", type=Path, required=True, help="file of outcomes, one a line")
    parser.add_argument("--out", type=Path, help="file for the row; printed if left out")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ends = time.monotonic() + 60 * options.minutes
    listed = yaml.safe_load(Path(__file__).with_name("mutation_equivalent.yaml").read_text(encoding="utf-8"))
    equivalent = {(entry["module"], entry["before"], entry["after"]) for entry in listed}
    outcomes: dict[tuple[str, str, str], str] = {}
    if options.found.exists():
        rows = [json.loads(line) for line in options.found.read_text(encoding="utf-8").splitlines()]
        outcomes = {(row["module"], row["before"], row["after"]): row["outcome"] for row in rows}
    drawn = [one for name in options.modules for one in mutants(name, options.share, options.seed)]
    drawn = [(mutant, changed) for mutant, changed in drawn if mutant.key not in equivalent]
    with tempfile.TemporaryDirectory(prefix="prunetune-mutants-") as scratch:
        tree = Path(scratch)
        shutil.copytree(ROOT / "src/prunetune", tree / "prunetune", ignore=shutil.ignore_patterns("__pycache__"))
        os.environ |= {"HF_MODULES_CACHE": str(tree / "modules"), "OMP_NUM_THREADS": "1"}
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a changed file may have the time and size of the one before
        sys.dont_write_bytecode = True
        import accelerate  # noqa: F401 - once, for all forks
        import torch

        torch.set_num_threads(1)
        timeouts: dict[tuple[str, ...], float] = {}
        for mutant, changed in drawn:
            if outcomes.get(mutant.key) == "killed" or time.monotonic() > ends:
                continue
            begun = time.monotonic()
            survived = survives(mutant, changed, tree, timeouts)
            outcomes[mutant.key] = "survived" if survived else "killed"
            row = asdict(mutant) | {"outcome": outcomes[mutant.key], "seconds": round(time.monotonic() - begun, 1)}
            give(row, options.found)
            print(*row.values(), sep="  ", flush=True)
    tried = {mutant.key: mutant for mutant, _ in drawn if mutant.key in outcomes}
    survivors = [mutant for key, mutant in tried.items() if outcomes[key] == "survived"]
    counts, lost = Counter(key[0] for key in tried), Counter(mutant.module for mutant in survivors)
    for module, count in counts.items():
        print(f"{module}: {lost[module]} of {count} survived")
    for mutant in survivors:
        print(f"{mutant.module}:{mutant.line}: {mutant.before}  ->  {mutant.after}")
    if tried:
        give(summary(len(survivors), len(tried), len(counts), options), options.out)


def summary(survived: int, tried: int, modules: int, options: argparse.Namespace) -> dict[str, object]:
    """The row for results.jsonl."""
    from prunetune.utils.environment import installed_commit

    case = f"mutants of {modules} core modules that their tests do not notice, {survived} of {tried}"
    command = f"python benchmarks/reliability/mutation.py --share {options.share:g} --seed {options.seed}"
    return {
        "bar": "N5", "case": case, "value": round(survived / tried, 3), "target": "<= 0.08", "met": None,
        "unit": "share", "device": "CPU", "command": command, "commit": installed_commit(), "final": False,
    }  # fmt: skip


if __name__ == "__main__":
    main()
