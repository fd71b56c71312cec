"""A6: how long `prunetune --help` takes, as a whole process: median of several runs.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 15
COMMAND = [sys.executable, "-m", "prunetune.cli", "--help"]


def seconds() -> float:
    started = time.perf_counter()
    subprocess.run(COMMAND, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    seconds()  # the first fills the file cache
    times = sorted(seconds() for _ in range(RUNS))
    print(f"median {statistics.median(times):.3f} s, {times[0]:.3f} to {times[-1]:.3f} s, {RUNS} runs")


if __name__ == "__main__":
    main()
