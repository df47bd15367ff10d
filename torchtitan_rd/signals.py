"""SIGINT, SIGTERM and SIGUSR1 (Ctrl-C, Slurm's preemption and time limit): remembers what was asked, and
writes the word that train.py chooses into `exit_status.json`.

One state machine. Before the first step and during an export a signal ends what runs there, since no step is
under way that could be saved. From the first step on it is remembered: the step is finished and saved on all
ranks alike, for the flag of each rank is one number among those that a step sums over all ranks
(parallelism/step_sums.py), and `Trainer._train` saves and ends. Further signals change nothing, so that an
impatient launcher does not lose the save it asked for; only a hasty third one ends the run.
"""

import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from torchtitan_rd.log import logger
from torchtitan_rd.masking import mask_text

EXIT_STATUS = "exit_status.json"
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = 130
"""Exit code of a run that a signal ended without a checkpoint of its last step."""

HASTE = 2.0
"""Seconds after the signal before: a third one that comes sooner ends the run at once."""
SAME_EVENT = 0.1
"""Seconds. A terminal, torchrun and srun may each pass the same Ctrl-C on:
signals that come together are one.
"""
PATIENCE = 5.0
"""Seconds for storage to say what would be lost, or to take an exit status: an end at once
waits no longer.
"""
UNWINDING = 10.0
"""Seconds that the main thread may stay deaf to a signal before the first step (it waits for a
peer in C++).
"""

Status = Literal["finished", "preempted", "stopped", "failed", "looping"]


class Interrupted(BaseException):
    """A signal, where no step is under way. As KeyboardInterrupt no Exception:
    nothing may take it for an error.
    """


class StopRequest:
    """What the signals to this rank ask for. As a context it listens;
    outside of one it is never asked to stop.

    Python runs handlers in the main thread only, between two bytecodes, so a rank that waits for the GPU or
    for a peer would be deaf. The C-level handler writes each signal's number to a pipe
    (`signal.set_wakeup_fd`), and a thread reads it there: it counts, logs, and can end the process while
    the main thread hangs.

    ends_at_once: whether a signal raises Interrupted in the main thread (once),
        instead of waiting for a step's end.
    cause: why this process asked itself (`ask`); None where somebody else did.
    agreed: whether all ranks know of a request, through `agree`.
    lost: says what would be lost if the process ended now. record: writes that it does, with the reason.
    look: a cause that is there already, though nobody has asked for an end yet.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.cause: str | None = None
        self.ends_at_once = True
        self.agreed = False
        self.lost: Callable[[], str] = lambda: "training had not begun"
        self.record: Callable[[str], object] = lambda reason: None
        self.look: Callable[[], str | None] = lambda: None
        self._has_interrupted = False
        self._count, self._last_time = 0, -SAME_EVENT

    def __enter__(self) -> "StopRequest":
        self._pipe, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        self._wakeup, self._previous_wakeup = wakeup, signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        # Closing would not do: a forked data worker may hold the pipe's other end too.
        os.write(self._wakeup, b"\0")
        self._thread.join()
        os.close(self._wakeup)
        os.close(self._pipe)

    def received(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.signal_name is not None

    def reason(self) -> str:
        """For `exit_status.json`."""
        if self.cause is not None:
            return self.cause
        if self.received():
            return f"received {self.signal_name}"
        # Another rank may have seen first what this one would see in a moment.
        return self.look() or "another rank was told to stop"

    def ask(self, cause: str) -> None:
        """Asks for an end as a SIGTERM does; for any thread."""
        logger.error("%s", cause)
        self.cause = cause
        os.kill(os.getpid(), signal.SIGTERM)

    def agree(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop, the same on all. Collective;
        waits for the work queued on `device`.
        """
        asked = torch.tensor(float(self.received()), device=device)
        dist.all_reduce(asked)
        self.agreed = self.agreed or bool(asked.item())
        return self.agreed

    def explains_an_end(self) -> bool:
        """Whether the run ends because of a signal, and not at a step."""
        return self.ends_at_once and (self.received() or self.agreed)

    @contextmanager
    def at_once(self, device: torch.device) -> Iterator[None]:
        """Within it a signal ends what runs, as before the first step;
        one that came earlier does so on all ranks.
        """
        is_asked = self.agree(device)
        self.ends_at_once = True
        if is_asked:
            self._has_interrupted = True  # what unwinds must not be interrupted again
            raise Interrupted("a signal came before")
        yield
        self.ends_at_once = False  # not after an exception, which `explains_an_end` may explain

    def _handle(self, number: int, frame: object) -> None:
        """In the main thread."""
        self.signal_name = self.signal_name or signal.Signals(number).name
        if self.ends_at_once and not self._has_interrupted:
            self._has_interrupted = True  # what unwinds must not be interrupted again
            raise Interrupted(f"received {self.signal_name}")

    def _listen(self) -> None:
        """The thread."""
        while True:
            readable, _, _ = select.select([self._pipe], [], [], UNWINDING if self._is_deaf() else None)
            if not readable:
                if self._is_deaf():
                    self.end(f"received {self.signal_name} while waiting, for a peer perhaps")
                continue
            numbers = os.read(self._pipe, 64)
            for number in numbers:
                if number in HANDLED:
                    self._hear(signal.Signals(number).name)
            if 0 in numbers:
                return

    def _is_deaf(self) -> bool:
        """Whether the main thread has yet to come to its handler."""
        return self.ends_at_once and self.received() and not self._has_interrupted

    def _hear(self, name: str) -> None:
        now = time.monotonic()
        since = now - self._last_time
        if since < SAME_EVENT:
            return
        self._last_time = now
        self._count += 1
        self.signal_name = self.signal_name or name
        if self._count == 1:
            plan = "stopping" if self.ends_at_once else "finishing this step, then stopping"
            logger.warning("received %s: %s", name, plan)
        elif self._count > 2 and since < HASTE:
            self.end(f"received {name} three times, the last within {HASTE:g} s")
        else:
            logger.warning(
                "received %s again: still stopping; another one within %g s ends the run at once (%s)",
                *(name, HASTE, self._losses()),
            )

    def end(self, reason: str) -> None:
        """Ends the process whatever the main thread does; for any thread."""
        reason = f"{reason}: ended at once; {self._losses()}"
        logger.error("%s", reason)
        _within_patience(lambda: self.record(reason))
        os._exit(STOPPED)

    def _losses(self) -> str:
        return _within_patience(self.lost) or "what is lost is not known, as the storage does not answer"


def _within_patience(call: Callable[[], Any]) -> Any:
    """What `call` gives; None if it fails or takes too long, as on a file system that is gone."""
    answers: list[Any] = []

    def ask() -> None:
        with suppress(Exception):
            answers.append(call())

    thread = threading.Thread(target=ask, name="storage", daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers[0] if answers else None


def write_exit_status(
    folder: Path, status: Status, step: int, reason: str = "", rank: int = 0, replace: bool = False
) -> bool:
    """`exit_status.json`, by which the launch scripts decide whether to requeue: only a preempted run is.
    Returns whether it holds this word now.

    The first rank that writes is the one that tells: the others often fail only because it has. replace:
    writes in place of what is there, an earlier run's perhaps. Best effort, since it often tells of the full
    disk that it is to be written on.
    """
    path = folder / EXIT_STATUS
    staged = folder / f".{EXIT_STATUS}-{rank}"
    told = {"status": status, "step": step, "rank": rank, "reason": mask_text(reason), "time": time.time()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(told) + "\n")
        if not replace:
            return _publish(staged, path)
        staged.replace(path)
        return True
    except OSError as error:
        logger.warning("cannot write %s: %s", path, error.strerror or error)
        return False
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def _publish(staged: Path, path: Path) -> bool:
    """Makes `staged` visible as `path` at once, unless that is there already; returns whether it did."""
    try:
        os.link(staged, path)  # unlike a rename it does not replace
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        staged.replace(path)
    return True


def remove_exit_status(folder: Path) -> bool:
    """Removes what an earlier run has left, which must not stand for this one;
    returns whether there was anything.
    """
    path = folder / EXIT_STATUS
    was_there = path.exists()
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return was_there
