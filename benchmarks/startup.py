"""A6, H5: how long `prunetune --help` and `from prunetune import run` take, each as a whole process.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 15
COMMANDS = {
    "prunetune --help": [sys.executable, "-m", "prunetune.cli", "--help"],
    "from prunetune import run": [sys.executable, "-c", "from prunetune import run"],
}


def seconds(command: list[str]) -> float:
    """Of one process, from its start to its end."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the median and the range for each command."""
    for name, command in COMMANDS.items():
        seconds(command)  # the first fills the file cache
        times = sorted(seconds(command) for _ in range(RUNS))
        print(f"{name}: median {statistics.median(times):.3f} s, {times[0]:.3f} to {times[-1]:.3f} s, {RUNS} runs")


if __name__ == "__main__":
    main()
