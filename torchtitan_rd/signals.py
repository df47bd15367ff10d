"""SIGTERM and SIGUSR1 (Slurm's preemption and time limit): remembered, and said in a file at the end.

All ranks must stop at the same step. The flag of each rank is one number among those that a step sums over all ranks
(parallelism/step_sums.py), so agreeing costs no collective of its own.
"""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from torchtitan_rd.log import logger
from torchtitan_rd.masking import mask_text

EXIT_STATUS = "exit_status.json"
HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal to this rank. One that stopped alone would hang the rest: the step makes it every rank's."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in HANDLED}

    def _receive(self, number: int, frame: object) -> None:
        self.signal_name = signal.Signals(number).name  # a handler may do no more than this safely

    def received(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signal_name is not None

    def announce(self) -> None:
        """Once all ranks agree: on a rank that was asked, says why the run ends."""
        if self.signal_name is not None:
            logger.warning("received %s: saving a checkpoint and stopping", self.signal_name)

    def restore(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def write_exit_status(
    folder: Path, status: Literal["finished", "preempted", "failed"], step: int, reason: str = ""
) -> None:
    """`exit_status.json`, by which the launch scripts decide whether to requeue: only a preempted run is.

    Best effort, since it often tells of the full disk that it is to be written on. An earlier run's file never stays.
    """
    path = folder / EXIT_STATUS
    staged = path.with_suffix(".tmp")
    told = {"status": status, "step": step, "reason": mask_text(reason), "time": time.time()}
    try:
        staged.write_text(json.dumps(told) + "\n")
        staged.replace(path)
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error.strerror or error)
        for name in (path, staged):
            with suppress(OSError):
                name.unlink(missing_ok=True)
