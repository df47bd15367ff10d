"""One run in one folder: `.lock` names its owner, and the lock of a dead owner is taken over.

An owner whose process could be seen from here lives if its pid does with the same start time (a pid can be
reused); otherwise it is taken over at once. Any other owner, as after a requeue to another host, renews the
lock's time of change every HEARTBEAT_SECONDS; the lock is watched for WATCH_SECONDS and taken over if it was
not renewed. Watching for change needs no agreement of clocks.

A host name does not say whose pids these are: two containers of one host, or two machines called "localhost",
have the same name and other processes. A pid means something only to the same boot of the same kernel
(`boot_id`) in the same PID namespace, so both must be known and equal before /proc decides anything.
"""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger

HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 60.0


class FolderLock:
    """Holds `folder/.lock` until `release()`. Raises CheckpointError if a living run holds it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / ".lock"
        self._content = json.dumps({"id": uuid.uuid4().hex, **_this_process()})
        while not self._create():
            self._remove_if_stale()
        self._stop = threading.Event()
        # A daemon: it must not keep a process alive that forgot to release.
        self._heart = threading.Thread(target=self._beat, name="checkpoint-lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Stops the heartbeat and removes the lock, if it is still ours."""
        self._stop.set()
        self._heart.join()
        if _read(self.path) == self._content:
            self.path.unlink(missing_ok=True)

    def covers(self, folder: Path) -> bool:
        """Whether `folder` lies, with its symbolic links followed, within the one that is held."""
        return folder.resolve().is_relative_to(self.folder.resolve())

    def require_held(self) -> None:
        """Raises CheckpointError if another run has taken the lock over, as after this
        process was suspended.
        """
        if _read(self.path) != self._content:
            raise CheckpointError(f"{self.path} is no longer held by this run: another run uses the folder")

    def _create(self) -> bool:
        try:
            file = self.path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self._content)
        except OSError:
            # A full disk still takes the name of a file: without its content,
            # nobody could tell whose lock it is.
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _remove_if_stale(self) -> None:
        found = _read(self.path)
        if found is None:
            return
        owner = _parse(found)
        if _is_alive(owner, self.path):
            raise CheckpointError(
                f"{self.path.parent} is in use by {_named(owner)}, "
                f"started {owner.get('since', 'at an unknown time')}; "
                f"stop that run, or set another job.dump_folder or checkpoint.folder"
            )
        # Two runs may find the same stale lock: each renames what it sees, and looks at what it got.
        grave = self.path.with_name(f".lock-{uuid.uuid4().hex}")
        try:
            self.path.rename(grave)
        except FileNotFoundError:
            return
        if _read(grave) == found:
            logger.warning("taking over %s from %s", self.path, _named(owner))
        else:
            grave.rename(self.path)
            return
        grave.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if _read(self.path) == self._content:
                    os.utime(self.path)
            except OSError as error:
                logger.warning("cannot renew %s: %s", self.path, error.strerror or error)


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **_process_space(),
        "start_ticks": _start_ticks(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _process_space() -> dict[str, Any]:
    """Within what a pid of this process means something; None where this system does not tell.

    A /proc of another PID namespace (`unshare --pid` alone leaves the outer one mounted) shows other
    processes under our pids, so it counts as not telling.
    """
    try:
        if Path("/proc/self").readlink().name != str(os.getpid()):
            return {"boot_id": None, "pid_namespace": None}
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"boot_id": boot_id, "pid_namespace": Path("/proc/self/ns/pid").stat().st_ino}
    except OSError:
        return {"boot_id": None, "pid_namespace": None}


def _is_visible(owner: dict[str, Any]) -> bool:
    """Whether the owner's process, if it lives, is in this process's /proc."""
    here = _process_space()
    same = all(value is not None and owner.get(key) == value for key, value in here.items())
    return same and isinstance(owner.get("pid"), int) and owner.get("start_ticks") is not None


def _is_alive(owner: dict[str, Any], path: Path) -> bool:
    if _is_visible(owner):
        return _start_ticks(owner["pid"]) == owner["start_ticks"]
    logger.warning("%s is held by %s; watching it for %.0f s", path, _named(owner), WATCH_SECONDS)
    before, deadline = _changed(path), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, WATCH_SECONDS / 10))
        if _changed(path) != before:
            return True
    return False


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "an unknown process (the lock has no readable content)"
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _start_ticks(pid: int) -> int | None:
    """When process `pid` started, in clock ticks since boot (field 22 of /proc/PID/stat); None if there is
    none, or a zombie, for which nobody waits.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _changed(path: Path) -> int | None:
    """Time of last change. Opening the file makes a network file system ask its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    try:
        owner = json.loads(text)
    except ValueError:  # its writer died, or is still writing: the heartbeat decides
        return {}
    return owner if isinstance(owner, dict) else {}
