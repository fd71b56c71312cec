"""One process among several that a launcher started: its rank, and a last line however it ends. No torch here."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

STOP_GRACE_SECONDS = 15.0  # for a clean end after a stop signal; launchers kill after 30
MULTI_PROCESS_COMMANDS = ("run", "demo")  # the commands that several processes can run together


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes, as `accelerate launch` and torchrun set them; else (0, 1)."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rank_prefix() -> str:
    """ "rank 1 of 2: ", or nothing for a process alone."""
    rank, world = rank_and_world_size()
    return f"rank {rank} of {world}: " if world > 1 else ""


def single_process_error(command: str) -> str:
    """Why several processes cannot run this command; "" if they can, or if there is one process."""
    if rank_and_world_size()[1] == 1 or command in MULTI_PROCESS_COMMANDS:
        return ""
    return f"{command or 'this'} is work for one process: start it without accelerate launch"


def run_and_exit_on_failure(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code; one of several processes ends at once on failure: others may wait for it."""
    if rank_and_world_size()[1] == 1:
        return main()
    # A process that waits for ranks that are gone cannot stop by itself, so a thread ends it.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_exit_after_stop_signal, args=(read_end,), daemon=True).start()
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException as bug:  # its traceback is what helps
        sys.excepthook(type(bug), bug, bug.__traceback__)
        code = 1
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _exit_after_stop_signal(read_end: int) -> None:
    while os.read(read_end, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
        pass
    time.sleep(STOP_GRACE_SECONDS)
    sys.stderr.write(f"prunetune: {rank_prefix()}told to stop, as when another rank ends; continue with --resume\n")
    sys.stderr.flush()
    os._exit(130)
