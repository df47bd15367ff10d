"""One rank of a run under attack: torchtitan_rd.train in a process group of its own, with failpoints.

    python -m tests.chaos.rank [--slow-steps SECONDS] [--disk-full FILE] -- --training.steps=10 ...

    --slow-steps SECONDS    each step is so much longer, which changes none of its numbers
    --slow-saves SECONDS    each save is so much longer before its first byte is written
    --disk-full FILE        while FILE exists a save finds no space

Without options nothing is replaced. The package itself has no such switches.
"""

import argparse
import errno
import os
import sys
import time
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

from torchtitan_rd import train
from torchtitan_rd.train_step import TrainStep


def install(options: list[str]) -> None:
    """Replaces what the options name, and nothing else."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slow-steps", type=float)
    parser.add_argument("--slow-saves", type=float)
    parser.add_argument("--disk-full", type=Path)
    chosen = parser.parse_args(options)
    if chosen.slow_steps:
        slow_steps(chosen.slow_steps)
    if chosen.slow_saves:
        slow_saves(chosen.slow_saves)
    if chosen.disk_full:
        disk_full(chosen.disk_full)


def slow_steps(seconds: float) -> None:
    call = TrainStep.__call__

    def slowed(self, *arguments):
        time.sleep(seconds)
        return call(self, *arguments)

    TrainStep.__call__ = slowed


def slow_saves(seconds: float) -> None:
    write_data = FileSystemWriter.write_data

    def slowed(self, plan, planner):
        time.sleep(seconds)
        return write_data(self, plan, planner)

    FileSystemWriter.write_data = slowed


def disk_full(file: Path) -> None:
    write_data = FileSystemWriter.write_data

    def write_unless_full(self, plan, planner):
        if file.exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        return write_data(self, plan, planner)

    FileSystemWriter.write_data = write_unless_full


def main() -> int:
    if os.getpgid(0) != os.getpid():  # torchrun has done so, and may not be asked again
        os.setpgid(0, 0)
    split = sys.argv.index("--")
    install(sys.argv[1:split])
    return train.main(sys.argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(main())
