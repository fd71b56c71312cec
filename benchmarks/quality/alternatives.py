"""Bar Q2: is pruning better than int8, than 4 bits, than a smaller model? One table a domain; the winner is opened.

    python benchmarks/quality/alternatives.py --data DATA --model HuggingFaceTB/SmolLM2-135M --out OUT \
        [--rival SMALLER] [--domains legal healthcare] [--formats int8,q4_k_m] [--device NAME] [--rows FILE] \
        [-- OPTIONS OF `compare`]

Runs `prunetune compare recipes/DOMAIN.yaml --compare.measure=true --keep-best` into OUT/DOMAIN: dense, pruned, and
a smaller model tuned on the same data (for Gemma 3 270M: `--rival HuggingFaceTB/SmolLM2-135M`), each also in the
formats. Folders that are there are resumed. Then the winner's file or folder answers one request through
`prunetune bench`, in a process of its own. Writes a row of results.jsonl for each domain.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import give

from prunetune.utils.environment import installed_commit

RECIPES = Path(__file__).parents[2] / "recipes"


def prunetune(*words: str) -> None:
    """Run a command of prunetune; it prints as it would for a user, and a failure ends this script."""
    subprocess.run([sys.executable, "-m", "prunetune.cli", *words], check=True)


def main() -> None:
    words = sys.argv[1:]
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rival", help="a smaller model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domains", nargs="+", default=["legal", "healthcare"])
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of DOMAIN.yaml")
    parser.add_argument("--formats", default="int8,q4_k_m")
    parser.add_argument("--device", default="")
    parser.add_argument("--rows", type=Path, help="file to append to; default: print")
    arguments = parser.parse_args(own)
    compared = ["--compare.methods", "dense,progressive", "--compare.formats", arguments.formats, "--keep-best"]
    compared += [
        "--compare.measure=true",
        *(["--compare.rivals", arguments.rival] if arguments.rival else []),
        *options,
    ]
    for domain in arguments.domains:
        folder = arguments.out / domain
        place = ["--data.root", arguments.data, "--model", arguments.model, "--out", str(folder)]
        prunetune("compare", str(arguments.recipes / f"{domain}.yaml"), *place, *compared, "--resume")
        table = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        winner = str(folder / table["best"]["path"])
        prunetune("bench", winner, "--dense=false", "--prompt", "16", "--generate", "2", "--batch", "1", "--runs", "1")
        row = next(row for row in table["rows"] if row["method"] == table["best"]["method"])
        row = {
            "bar": "Q2",
            "case": f"{domain}, {arguments.model}: weights of {row['method']}, the smallest as good as dense; it opens",
            "value": round(row["bytes"] / 1e6, 2),
            "target": "",
            "met": Path(winner).exists(),
            "unit": "MB",
            "device": arguments.device,
            "command": shlex.join(["python", "benchmarks/quality/alternatives.py", *words]),
            "commit": installed_commit()[:7],
        }
        give(row, arguments.rows)


if __name__ == "__main__":
    main()
