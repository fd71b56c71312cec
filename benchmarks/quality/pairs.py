"""One method minus another, from their cells: paired over items and seeds by the function of the comparison's tables.

    python benchmarks/quality/pairs.py progressive:fisher progressive:dense --of RESULTS.json OUT/healthcare-0
        [--minus OTHER.json OUT/healthcare-1] [--keep 0.6] [--metrics nll acc "acc casehold"]

Sources are files of results (`merged.py`) or folders of comparisons; the other method's cells are from the source in
the same place of `--minus`, or from the same source. Printed: the difference, its standard error over paired items, and
in brackets over seeds. Differences of nll are nats, of acc and rouge_l shares, of ppl perplexities.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from merged import read_results

from prunetune.compare.markdown import format_difference, markdown_table
from prunetune.compare.table import mean_difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="METHOD:OTHER")
    parser.add_argument("--of", nargs="+", type=Path, required=True, metavar="SOURCE")
    parser.add_argument("--minus", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--metrics", nargs="+", help="default: all means, texts, and each task's accuracy and ROUGE-L")
    arguments = parser.parse_args()
    for source, other in zip(arguments.of, arguments.minus or arguments.of, strict=True):
        ours, theirs = read_results([source]), read_results([other])
        columns = ours.comparison([arguments.keep])
        metrics = arguments.metrics or [*columns["metrics"], *columns["forgetting"], *columns["tasks"]]
        rows = []
        for pair in arguments.methods:
            method, _, behind = pair.partition(":")
            group, other_group = ours.group(method, arguments.keep), theirs.group(behind, arguments.keep)
            if group is None or other_group is None:
                print(f"{source}: no cells of {pair} at keep {arguments.keep:g}")
                continue
            seeds = len(set(group.seeds) & set(other_group.seeds))
            differences = [format_difference(mean_difference(group, other_group, metric)) for metric in metrics]
            rows.append([pair.replace(":", " - "), str(seeds), *differences])
        if rows:
            print(f"{source}, keep {arguments.keep:g}:\n\n{markdown_table(['methods', 'seeds', *metrics], rows)}\n")


if __name__ == "__main__":
    main()
