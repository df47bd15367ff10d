"""How long saves take, beside how long a job lives on after the signal that ends it."""

import json
from pathlib import Path

from torchtitan_rd.log import logger
from torchtitan_rd.whole_file import replace_file

SAVE_SECONDS = "save_seconds.json"
SHARE = 0.5
"""Of the grace period: the rest is for the step under way, and for storage that is slower than usual."""
NEWEST_WEIGHT = 0.3


class SaveTime:
    """A running mean of the seconds from the beginning of a save to its commit; on one rank, for any thread.

    folder: where the mean lies for the next start, which may follow a kill in the midst of a save.
    grace: seconds from the signal to the kill; None where nobody knows them. Nothing is warned of then, and
        nothing is written.
    """

    def __init__(self, folder: Path, grace: float | None):
        self._path, self._grace = folder / SAVE_SECONDS, grace
        self._warned_at = 0.0
        self.seconds = self._read() if grace is not None else None
        self._warn_if_long()

    def add(self, seconds: float) -> None:
        """A save has taken so long."""
        if self._grace is None:
            return
        before = seconds if self.seconds is None else self.seconds
        self.seconds = before + NEWEST_WEIGHT * (seconds - before)
        self._write()
        self._warn_if_long()

    def _warn_if_long(self) -> None:
        """Once, and again when the mean has doubled."""
        if self._grace is None or self.seconds is None:
            return
        if self.seconds > max(SHARE * self._grace, 2 * self._warned_at):
            self._warned_at = self.seconds
            logger.warning(
                "a save takes %.1f s and a job is killed %g s after the signal that ends it: a preemption "
                "may lose the steps since the last checkpoint; raise that time, or save more often "
                "(TORCH_ELASTIC_SHUTDOWN_TIMEOUT, Slurm's --signal; checkpoint.grace_seconds says it)",
                *(self.seconds, self._grace),
            )

    def _read(self) -> float | None:
        try:
            return float(json.loads(self._path.read_text())["seconds"])
        except (OSError, ValueError, TypeError, KeyError):  # it is a hint: without it the next save tells
            return None

    def _write(self) -> None:
        try:
            replace_file(self._path, json.dumps({"seconds": self.seconds}) + "\n")
        except OSError as error:
            logger.warning("cannot write %s: %s", self._path, error.strerror or error)
