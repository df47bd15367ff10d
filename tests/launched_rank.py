"""One rank of a run that the tests launch: torchtitan_rd.train, made to die or to pause at a chosen place.

    python -m tests.launched_rank --die-at RANK STEP MICROBATCH -- --job.config_file X.toml ...

    # Each step, from the FROMth on, is so much longer:
    python -m tests.launched_rank --slow SECONDS [FROM] -- ...

    # On one rank alone:
    python -m tests.launched_rank --slow-rank RANK SECONDS -- ...

    # So is the reading of the data; FILE.RANK says when:
    python -m tests.launched_rank --slow-start SECONDS FILE -- ...

    # An exception in a step:
    python -m tests.launched_rank --fail-at RANK STEP -- ...

The package itself has no such switches.
"""

import os
import signal
import sys
import time
from pathlib import Path

from torchtitan_rd import parts, train
from torchtitan_rd.train_step import TrainStep


def die_at(rank: int, step: int, microbatch: int) -> None:
    """kill -9 of this very process in the midst of a step, after `microbatch` backward passes."""
    call, backward = TrainStep.__call__, TrainStep._backward
    now = {"step": 0, "microbatch": 0}

    def watched_call(self, number, *arguments):
        now.update(step=number, microbatch=0)
        return call(self, number, *arguments)

    def watched_backward(self, *arguments):
        if (int(os.environ["RANK"]), now["step"], now["microbatch"]) == (rank, step, microbatch):
            os.kill(os.getpid(), signal.SIGKILL)
        now["microbatch"] += 1
        return backward(self, *arguments)

    TrainStep.__call__, TrainStep._backward = watched_call, watched_backward


def fail_at(rank: int, step: int) -> None:
    """The other ranks find out by themselves."""
    call = TrainStep.__call__

    def failing(self, number, *arguments):
        if (int(os.environ["RANK"]), number) == (rank, step):
            raise ValueError("told to fail")
        return call(self, number, *arguments)

    TrainStep.__call__ = failing


def slow(seconds: float, first: int = 1) -> None:
    call = TrainStep.__call__

    def slowed(self, number, *arguments):
        time.sleep(seconds if number >= first else 0)
        return call(self, number, *arguments)

    TrainStep.__call__ = slowed


def slow_rank(rank: int, seconds: float) -> None:
    if int(os.environ["RANK"]) == rank:
        slow(seconds)


def slow_start(seconds: float, file: str) -> None:
    build = parts.build_dataloader

    def slowed(*arguments, **options):
        Path(f"{file}.{os.environ['RANK']}").touch()
        time.sleep(seconds)
        return build(*arguments, **options)

    parts.build_dataloader = slowed


if __name__ == "__main__":
    split = sys.argv.index("--")
    options, arguments = sys.argv[1:split], sys.argv[split + 1 :]
    if options[:1] == ["--die-at"]:
        die_at(*map(int, options[1:]))
    elif options[:1] == ["--slow"]:
        slow(float(options[1]), *map(int, options[2:]))
    elif options[:1] == ["--slow-rank"]:
        slow_rank(int(options[1]), float(options[2]))
    elif options[:1] == ["--slow-start"]:
        slow_start(float(options[1]), options[2])
    elif options[:1] == ["--fail-at"]:
        fail_at(*map(int, options[1:]))
    sys.exit(train.main(arguments))
