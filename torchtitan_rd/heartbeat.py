"""Says which rank hangs, and where: every rank keeps a small file up to date, and rank 0 compares them.

The training thread only stores where it stands. A daemon thread writes it down every few seconds, so it
goes on while the training thread hangs in a collective. A beat that is no longer renewed means a
stopped or dead process.

Up to 256 ranks each has a file of its own in the shared folder. Above that a file holds the ranks of one
node, which leave their beats in the node's memory, where its first rank gathers them: a shared file system
does not like thousands of files renamed every few seconds. `rank_R.json` is the list of the beats of the
ranks from R on, in both cases.
"""

import faulthandler
import hashlib
import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchtitan_rd.errors import listed
from torchtitan_rd.log import logger

_MAX_NAMED = 8  # ranks named in one warning
_MOST_FILES = 256  # more ranks than this share a file with the others of their node
_PATIENCE = 3.0  # a silence is a hang if it is so many times what the run has needed so far
_REMEMBERED = 33  # durations of each kind, for their median: a stall or two must not move it


class Pace:
    """How long this run's steps and phases take, and so how long a silence is still healthy.

    A step of 131072 tokens may take 90 s, nearly all of them in one phase, and one of a debug run 10 ms: what
    counts as a hang must follow the run. minimum: seconds that are always allowed. first_time: seconds that
    are allowed in a phase that has not ended once yet (compilation, the first validation). Times are in
    seconds on any clock.
    """

    def __init__(self, minimum: float, first_time: float):
        self._minimum, self._first_time = minimum, first_time
        self._took: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._step: tuple[int, float] | None = None
        self._phase: tuple[str, float] | None = None
        self.allowed = max(minimum, first_time)
        """Seconds of silence that are healthy in the present phase."""

    def enter(self, step: int, phase: str, now: float) -> None:
        """The present phase has ended, and `phase` of `step` begins."""
        if self._phase is not None:
            last, since = self._phase
            self._took[last].append(now - since)
        if self._step is not None and self._step[0] != step:
            self._took["whole step"].append(now - self._step[1])
        if self._step is None or self._step[0] != step:
            self._step = (step, now)
        kind = phase.split()[0]  # "microbatch 3 of 16" is like "microbatch 1 of 16"
        self._phase = (kind, now)
        known = [statistics.median(self._took[name]) for name in ("whole step", kind) if name in self._took]
        first_time = 0.0 if kind in self._took else self._first_time
        self.allowed = max(self._minimum, first_time, *(_PATIENCE * seconds for seconds in known))


@dataclass
class _Seen:
    """What rank 0 knows of a rank. Times are rank 0's own monotonic clock: hosts' clocks differ."""

    beat: dict | None
    advanced: float  # when (step, index) last changed
    alive: float  # when the file last changed

    def update(self, beat: dict, now: float) -> None:
        if beat == self.beat:
            return
        if self.beat is None or _position(beat) != _position(self.beat):
            self.advanced = now
        self.alive = now
        self.beat = beat


class Heartbeat:
    """One rank's heartbeat; on rank 0 also the watch over all of them. `close` it before the process group.

    folder: shared by all ranks. interval: seconds between two writes; 0 switches everything off.
    warn_after: seconds without an advance of any rank until rank 0 warns, and until each rank writes the
        Python stacks of its threads to `rank_R.stacks`; more where the run itself is slower, see `Pace`,
        which has `first_time` too. Rank 0 warns again each time that the silence has doubled.
    local_rank, local_world_size: this rank among those of its node, which are numbered in one row.
        most_files: how many files may be in the shared folder before the ranks of a node share one.

    on_beat: told each beat, too.

    All ranks must call `beat` in the same sequence: behind is whoever has the fewest beats in the
    earliest step. Two blind spots: if rank 0's own process is stopped nobody watches, and on a network
    file system other hosts' files are seen late (up to a minute with NFS's default caching), so there
    `warn_after` should be minutes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        interval: float,
        warn_after: float,
        first_time: float = 0.0,
        local_rank: int = 0,
        local_world_size: int = 1,
        most_files: int = _MOST_FILES,
        on_beat: Callable[[int, str], None] = lambda step, phase: None,
    ):
        self._folder = folder
        self._rank = rank
        self._interval = interval
        self._on_beat = on_beat
        self._pace = Pace(warn_after, first_time)
        self._ranks_per_file = local_world_size if world_size > most_files else 1
        # Who writes the file of this rank.
        self._leader = rank - local_rank if self._ranks_per_file > 1 else rank
        self._local = _node_folder(folder)
        self._state = (0, 0, "start", time.time())  # step, index of the beat in the step, phase, since
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        now = time.monotonic()
        self._seen = [_Seen(None, now, now) for _ in range(world_size)] if rank == 0 else []
        self._warnings = 0
        self._stuck_since = (self._state, now)
        self._stacks_written = False
        self._write_failed = False
        if interval <= 0:  # beats are kept for nobody: no files and no thread
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self._ranks_per_file > 1:
            self._local.mkdir(parents=True, exist_ok=True)
            # What a run that was killed left here; who has written already soon does again.
            for path in self._local.glob("rank_*") if rank == self._leader else ():
                path.unlink(missing_ok=True)
        if rank == 0:
            self._remove_old_files()
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Notes that this rank enters `phase` of `step`. Costs microseconds: no file,
        no lock, no device sync.
        """
        self._on_beat(step, phase)
        self._pace.enter(step, phase, time.monotonic())
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
            if self._ranks_per_file > 1 and self._rank == self._leader:
                shutil.rmtree(self._local, ignore_errors=True)

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._write()
            self._dump_stacks_if_stuck()
            if self._rank == 0:
                self._watch()

    def _save(self, path: Path, save: Callable[[Path], object]) -> None:
        """Writes a file whole or not at all. A full disk ends neither the watch nor,
        from here, the training.
        """
        fresh = path.with_name(f".{path.name}.tmp")
        try:
            save(fresh)
            fresh.replace(path)
        except OSError as error:
            if not self._write_failed:
                logger.warning("heartbeat: cannot write %s: %s", path, error)
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
        if self._rank != self._leader:
            # At the end the leader may have gone first.
            if self._local.is_dir() or not self._closing.is_set():
                self._save(self._local / f"rank_{self._rank}.json", _as_json([beat]))
            return
        others = range(self._leader + 1, self._leader + self._ranks_per_file)
        beats = [beat, *(found for rank in others for found in _read(self._local / f"rank_{rank}.json"))]
        self._save(self._folder / f"rank_{self._leader}.json", _as_json(beats))

    def _dump_stacks_if_stuck(self) -> None:
        now = time.monotonic()
        if self._stuck_since[0] is not self._state:
            self._stuck_since = (self._state, now)
            self._stacks_written = False
        elif not self._stacks_written and now - self._stuck_since[1] >= self._pace.allowed:
            self._stacks_written = True
            self._save(self._folder / f"rank_{self._rank}.stacks", _write_stacks)

    def _watch(self) -> None:
        now = time.monotonic()
        for first in range(0, len(self._seen), self._ranks_per_file):
            for beat in _read(self._folder / f"rank_{first}.json"):
                self._seen[beat["rank"]].update(beat, now)
        silence = now - max(seen.advanced for seen in self._seen)
        allowed = self._pace.allowed
        if silence < allowed:
            if self._warnings:
                logger.info("the ranks advance again")
            self._warnings = 0
        elif silence >= allowed * 2**self._warnings:
            self._warnings += 1
            logger.warning("%s", self._report(silence, now))

    def _report(self, silence: float, now: float) -> str:
        # A rank that hangs still renews its file; one whose process is stopped or dead does not.
        deadline = max(3 * self._interval, self._pace.allowed / 2)
        dead = [r for r, seen in enumerate(self._seen) if now - seen.alive >= deadline]
        positions = [_position(seen.beat) for seen in self._seen]
        behind = [
            r
            for r, position in enumerate(positions)
            if position < max(positions) and position == min(positions)
        ]
        suspects = dead or behind
        head = f"no rank has advanced for {silence:.0f} s; "
        tail = f"; Python stacks: {self._folder}/rank_*.stacks"
        if not suspects:
            return head + f"all are alive and at the same place: {_phase(self._seen[0].beat)}" + tail
        named = (
            f"rank {r} ({_where(self._seen[r].beat)}, for {now - self._seen[r].advanced:.0f} s)"
            for r in suspects
        )
        what = "no sign of life from " if dead else "behind the others: "
        return head + what + listed(named, _MAX_NAMED) + tail

    def _remove_old_files(self) -> None:
        """An earlier run's files would count as ranks that stand still.
        A rank of this run writes its own again.
        """
        for path in self._folder.glob("rank_*"):
            path.unlink(missing_ok=True)


def _node_folder(folder: Path) -> Path:
    """Where the ranks of one node that share `folder` meet: in memory if it can be,
    the same for all of them.
    """
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    # The host's name, since a temporary folder may be shared between nodes, and the user's,
    # who may write to it.
    name = f"{socket.gethostname()}:{os.getuid()}:{folder.resolve()}"
    return parent / f"torchtitan_rd_heartbeat_{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _as_json(beats: list[dict]) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(beats))


def _write_stacks(path: Path) -> None:
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def _read(path: Path) -> list[dict]:
    """Nothing from a file that is not there yet; files are replaced whole, so what is there is complete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def _position(beat: dict | None) -> tuple[int, int]:
    return (-1, -1) if beat is None else (beat["step"], beat["index"])


def _phase(beat: dict | None) -> str:
    return "no heartbeat file yet" if beat is None else f"step {beat['step']}, phase {beat['phase']}"


def _where(beat: dict | None) -> str:
    return _phase(beat) if beat is None else f"host {beat['host']}, pid {beat['pid']}, {_phase(beat)}"
