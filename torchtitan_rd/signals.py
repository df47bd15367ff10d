"""SIGTERM and SIGUSR1 (Slurm's preemption and time limit): all ranks agree to stop, save, and say so in a file."""

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from torchtitan_rd.log import logger
from torchtitan_rd.masking import mask_text

EXIT_STATUS = "exit_status.json"
HANDLED = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers a signal to this rank; `agreed` makes it every rank's. One that stopped alone would hang the rest."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in HANDLED}

    def _receive(self, number: int, frame: object) -> None:
        self.signal_name = signal.Signals(number).name  # a handler may do no more than this safely

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. A collective on CPU tensors: every rank calls it at the same place."""
        flag = torch.tensor(int(self.signal_name is not None))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() and self.signal_name is not None:
            logger.warning("received %s: saving a checkpoint and stopping", self.signal_name)
        return bool(flag.item())

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
