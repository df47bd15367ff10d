"""One rank of a run that the tests launch: torchtitan_rd.train, made to die or to pause at a chosen place.

    python -m tests.launched_rank --die-at RANK STEP MICROBATCH -- --job.config_file X.toml ...
    python -m tests.launched_rank --slow SECONDS -- ...             # each step takes at least so long

The package itself has no such switches.
"""

import os
import signal
import sys
import time

from torchtitan_rd import train
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


def slow(seconds: float) -> None:
    call = TrainStep.__call__

    def slowed(self, *arguments):
        time.sleep(seconds)
        return call(self, *arguments)

    TrainStep.__call__ = slowed


if __name__ == "__main__":
    split = sys.argv.index("--")
    options, arguments = sys.argv[1:split], sys.argv[split + 1 :]
    if options[:1] == ["--die-at"]:
        die_at(*map(int, options[1:]))
    elif options[:1] == ["--slow"]:
        slow(float(options[1]))
    sys.exit(train.main(arguments))
