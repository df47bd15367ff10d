"""The saves of a run, one at a time: at once or in the background, and what becomes of one that fails."""

import dataclasses
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

from torchtitan_rd.checkpoint.config import CheckpointConfig
from torchtitan_rd.checkpoint.cpu_copies import CpuCopies
from torchtitan_rd.checkpoint.save_errors import SaveErrors
from torchtitan_rd.checkpoint.save_time import SaveTime
from torchtitan_rd.checkpoint.writer import Snapshot, Writer, writer_thread
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger

_STUCK: list[ThreadPoolExecutor] = []


def leave_stuck_saves(code: int) -> None:
    """Ends the process if a save was given up: Python would wait for its thread, and that for a lost rank."""
    if _STUCK:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Saves:
    """Hands snapshots to `writer`. Collective: every rank calls its methods alike.

    step: the step that a run can go on from, as far as this run knows; -1 if none, or if its save has failed.
    errors: counts of the saves that failed.
    """

    def __init__(self, config: CheckpointConfig, writer: Writer, save_time: SaveTime):
        self.step = -1
        self.errors = SaveErrors(config, writer.ranks.rank)
        self._is_async = config.async_mode != "disabled"
        self._writer, self._time = writer, save_time
        self._executor = writer_thread()
        self._in_flight: Future[None] | None = None
        self._copies = CpuCopies(pinned=config.async_mode == "async_with_pinned_mem")
        self._is_required = False  # the save that was begun last

    def begin(self, snapshot: Snapshot, started: float, *, required: bool) -> None:
        """Writes `snapshot`, in the async modes after this has returned. Not while one is in flight.

        started: when the save began, of `time.monotonic`. required: no later save makes up for this one.
        Raises CheckpointError on every rank if it fails, unless the run may go on without it.
        """
        self._is_required = required
        folder = self._writer.folder
        try:
            self._writer.ranks.from_rank0(lambda: folder.require_free(snapshot.stored_bytes()))
            if self._is_async:
                copied = dataclasses.replace(snapshot, tensors=self._copies.make(snapshot.tensors))
                self._in_flight = self._executor.submit(self._write, copied, started)
            else:
                self._write(snapshot, started)
                self.errors.succeeded()
        except CheckpointError as error:
            self._failed(error)
        else:
            self.step = snapshot.step if snapshot.name == f"step-{snapshot.step}" else -1

    def is_in_flight(self) -> bool:
        return self._in_flight is not None

    def has_ended(self) -> bool:
        """Whether this rank's share of the save in flight is written, or has failed;
        False if none is in flight.
        """
        return self._in_flight is not None and self._in_flight.done()

    def wait(self) -> None:
        """Waits for the save in flight. Raises as `begin` does."""
        if self._in_flight is None:
            return
        in_flight, self._in_flight = self._in_flight, None
        started = time.monotonic()
        try:
            in_flight.result()
        except CheckpointError as error:
            self._failed(error)
        else:
            self.errors.succeeded()
        waited = time.monotonic() - started
        if waited > 1:
            logger.warning(
                "waited %.1f s for the previous save; a larger checkpoint.interval avoids it", waited
            )

    def give_up_after(self, seconds: float) -> bool:
        """Waits so long for the save in flight, and leaves it to its thread then; returns whether it did."""
        if self._in_flight is None or wait([self._in_flight], timeout=seconds).done:
            return False
        logger.error("the save in flight is given up after %g s: another rank does not answer", seconds)
        self._in_flight = None
        _STUCK.append(self._executor)
        return True

    def close(self) -> None:
        """Idempotent; after `wait`."""
        if self._executor not in _STUCK:
            self._executor.shutdown()
            self._copies.close()

    def _write(self, snapshot: Snapshot, started: float) -> None:
        """In any thread."""
        self._writer.write(snapshot)
        self._time.add(time.monotonic() - started)

    def _failed(self, error: CheckpointError) -> None:
        """Raises `error` unless the run may go on without this save."""
        self.step = -1
        self.errors.failed(error, required=self._is_required)
        self._writer.ranks.from_rank0(self._require_folder)

    def _require_folder(self) -> None:
        """A folder that another run has taken over is no error of the storage."""
        if self._writer.lock is not None:
            with suppress(OSError):  # out of reach, as is all else there
                self._writer.lock.require_held()
