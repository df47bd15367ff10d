"""metrics.jsonl: one JSON object a logged step, each step once, whatever kills and restarts the
run has seen.
"""

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

from torchtitan_rd.errors import TrainingError
from torchtitan_rd.log import logger


class Journal:
    """An append-only file of JSON lines, each handed to the system at once:
    kill -9 tears at most the last one.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None

    def open(self, step: int) -> None:
        """Opens the file for the steps after `step`, that of the loaded checkpoint; 0 starts a new file.

        Rows beyond `step` will be computed again, so they are dropped, as are torn ones.
        A new run keeps the rows of an older one in the same folder in `metrics.previous.jsonl`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if step == 0:
                self._set_aside()
            else:
                self._rewind(step)
        self._file = self.path.open("ab", buffering=0)

    def append(self, row: dict[str, Any]) -> None:
        """Raises TrainingError if the line cannot be written, as on a full disk."""
        if self._file is None:
            raise RuntimeError(f"{self.path} is written to before it is opened")
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command again"
            ) from None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _set_aside(self) -> None:
        if self.path.stat().st_size > 0:
            previous = self.path.with_name("metrics.previous.jsonl")
            self.path.replace(previous)
            logger.info("this run starts at step 0: the earlier %s is now %s", self.path, previous.name)

    def _rewind(self, step: int) -> None:
        """Keeps the rows up to `step`. The new file takes the old one's place by a rename:
        a crash leaves either.
        """
        kept, unreadable = [], []
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            row_step = _step_of(line)
            if row_step is None:
                unreadable.append(number)
            elif row_step <= step:
                kept.append(line)
        if unreadable:
            logger.warning("%s: dropped unreadable lines %s (torn by a crash)", self.path, unreadable)
        fresh = self.path.with_suffix(".tmp")
        with fresh.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


def _step_of(line: bytes) -> int | None:
    """The step of a complete row; None if the line is torn or no row at all."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
