"""Says which rank hangs, and where: every rank keeps a small file up to date, and rank 0 compares them.

The training thread only stores where it stands. A daemon thread writes `rank_R.json` every few seconds, so it goes on
while the training thread hangs in a collective. A file that is no longer renewed means a stopped or dead process.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchtitan_rd.log import logger

_MAX_NAMED = 8  # ranks named in one warning


@dataclass
class _Seen:
    """What rank 0 knows of a rank. Times are rank 0's own monotonic clock: hosts' clocks differ."""

    beat: dict | None
    advanced: float  # when (step, index) last changed
    alive: float  # when the file last changed

    def update(self, beat: dict | None, now: float) -> None:
        if beat is None or beat == self.beat:
            return
        if self.beat is None or _position(beat) != _position(self.beat):
            self.advanced = now
        self.alive = now
        self.beat = beat


class Heartbeat:
    """One rank's heartbeat; on rank 0 also the watch over all of them. `close` it before the process group.

    folder: shared by all ranks. interval: seconds between two writes; 0 switches everything off.
    warn_after: seconds without an advance of any rank until rank 0 warns, and until each rank writes the Python stacks
        of its threads to `rank_R.stacks`. Rank 0 warns again each time that the silence has doubled.

    All ranks must call `beat` in the same sequence: behind is whoever has the fewest beats in the earliest step. Two
    blind spots: if rank 0's own process is stopped nobody watches, and on a network file system other hosts' files are
    seen late (up to a minute with NFS's default caching), so there `warn_after` should be minutes.
    """

    def __init__(self, folder: Path, *, rank: int, world_size: int, interval: float, warn_after: float):
        self._folder = folder
        self._rank = rank
        self._interval = interval
        self._warn_after = warn_after
        self._state = (0, 0, "start", time.time())  # step, index of the beat in the step, phase, since
        self._closing = threading.Event()
        self._thread = None
        if interval <= 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            self._remove_old_files()
        now = time.monotonic()
        self._seen = [_Seen(None, now, now) for _ in range(world_size)] if rank == 0 else []
        self._warnings = 0
        self._stuck_since = (self._state, now)
        self._stacks_written = False
        self._write_failed = False
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Notes that this rank enters `phase` of `step`. Costs a tuple: no file, no lock, no device sync."""
        index = self._state[1] + 1 if self._state[0] == step else 0
        self._state = (step, index, phase, time.time())

    def close(self) -> None:
        """Leaves `closed` as the last phase. May be called twice."""
        if self._thread is not None:
            self._closing.set()
            self._thread.join()
            self._thread = None
            self.beat(self._state[0], "closed")
            self._write()

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._write()
            self._dump_stacks_if_stuck()
            if self._rank == 0:
                self._watch()

    def _save(self, name: str, save: Callable[[Path], object]) -> None:
        """Writes a file whole or not at all. A full disk ends neither the watch nor, from here, the training."""
        fresh = self._folder / f".{name}.tmp"
        try:
            save(fresh)
            fresh.replace(self._folder / name)
        except OSError as error:
            if not self._write_failed:
                logger.warning("heartbeat: cannot write %s: %s", self._folder / name, error)
            self._write_failed = True

    def _write(self) -> None:
        step, index, phase, since = self._state
        beat = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": step,
            "index": index,
            "phase": phase,
            "since": since,
            "time": time.time(),
        }
        self._save(f"rank_{self._rank}.json", lambda path: path.write_text(json.dumps(beat)))

    def _dump_stacks_if_stuck(self) -> None:
        now = time.monotonic()
        if self._stuck_since[0] is not self._state:
            self._stuck_since = (self._state, now)
            self._stacks_written = False
        elif not self._stacks_written and now - self._stuck_since[1] >= self._warn_after:
            self._stacks_written = True
            self._save(f"rank_{self._rank}.stacks", _write_stacks)

    def _watch(self) -> None:
        now = time.monotonic()
        for rank, seen in enumerate(self._seen):
            seen.update(_read(self._folder / f"rank_{rank}.json"), now)
        silence = now - max(seen.advanced for seen in self._seen)
        if silence < self._warn_after:
            if self._warnings:
                logger.info("the ranks advance again")
            self._warnings = 0
        elif silence >= self._warn_after * 2**self._warnings:
            self._warnings += 1
            logger.warning("%s", self._report(silence, now))

    def _report(self, silence: float, now: float) -> str:
        # A rank that hangs still renews its file; one whose process is stopped or dead does not.
        deadline = max(3 * self._interval, self._warn_after / 2)
        dead = [r for r, seen in enumerate(self._seen) if now - seen.alive >= deadline]
        positions = [_position(seen.beat) for seen in self._seen]
        behind = [r for r, position in enumerate(positions) if position < max(positions) and position == min(positions)]
        suspects = dead or behind
        head = f"no rank has advanced for {silence:.0f} s; "
        tail = f"; Python stacks: {self._folder}/rank_*.stacks"
        if not suspects:
            beat = self._seen[0].beat
            return head + f"all are alive and at the same place: step {beat['step']}, phase {beat['phase']}" + tail
        named = ", ".join(
            f"rank {r} ({_where(self._seen[r].beat)}, for {now - self._seen[r].advanced:.0f} s)"
            for r in suspects[:_MAX_NAMED]
        )
        more = f" and {len(suspects) - _MAX_NAMED} more" if len(suspects) > _MAX_NAMED else ""
        return head + ("no sign of life from " if dead else "behind the others: ") + named + more + tail

    def _remove_old_files(self) -> None:
        """An earlier run's files would count as ranks that stand still. A rank of this run writes its own again."""
        for path in self._folder.glob("rank_*"):
            path.unlink(missing_ok=True)


def _write_stacks(path: Path) -> None:
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def _read(path: Path) -> dict | None:
    """None for a file that is not there yet; files are replaced whole, so what is there is complete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _position(beat: dict | None) -> tuple[int, int]:
    return (-1, -1) if beat is None else (beat["step"], beat["index"])


def _where(beat: dict | None) -> str:
    if beat is None:
        return "no heartbeat file yet"
    return f"host {beat['host']}, pid {beat['pid']}, step {beat['step']}, phase {beat['phase']}"
