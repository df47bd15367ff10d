"""Ends a circle of restarts: a step that fails each time that it is reached will not be mended by one more.

The dump folder holds a count of the failures of one step under one config. torchrun's restarts, Slurm's
requeues and the same command by hand are all alike here.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan_rd.errors import RestartLoopError
from torchtitan_rd.log import logger
from torchtitan_rd.masking import mask_text
from torchtitan_rd.whole_file import replace_file

FAILURES = "failures.json"
MOST_FAILURES = 3
"""As often a step may fail; there is no start after it."""
LOOPING = 3
"""Exit code of a run that ends, or does not begin, for this."""


class FailureCount:
    """How often the step that failed last has failed in a row, in `folder`.

    config: of the run. Failures under another one do not count: somebody has changed something.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        self._path = folder / FAILURES
        self._config = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

    def refuse_a_loop(self) -> None:
        """Raises RestartLoopError if a step has failed as often as it may. Changes nothing."""
        step, reasons = self._read()
        if len(reasons) >= MOST_FAILURES:
            raise self._error(step, reasons)

    def add(self, step: int, reason: str) -> RestartLoopError | None:
        """Notes that `step` has failed, on one rank; returns what ends the restarts, if it has too often."""
        failed, reasons = self._read()
        reasons = [*(reasons if failed == step else []), mask_text(reason)]
        told = {"config": self._config, "step": step, "reasons": reasons, "time": time.time()}
        try:
            replace_file(self._path, json.dumps(told, indent=1) + "\n")
        except OSError as error:  # a full disk is often why the step failed
            logger.warning("cannot write %s: %s", self._path, error.strerror or error)
        return self._error(step, reasons) if len(reasons) >= MOST_FAILURES else None

    def clear(self) -> None:
        """The run has finished."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> tuple[int, list[str]]:
        """The step and why it failed, each time; nothing of another config, or of a file cut short."""
        try:
            found = json.loads(self._path.read_text())
            if found["config"] == self._config:
                return int(found["step"]), [str(reason) for reason in found["reasons"]]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return -1, []

    def _error(self, step: int, reasons: list[str]) -> RestartLoopError:
        return RestartLoopError(
            f"step {step} has failed {len(reasons)} times in a row, the last time with: {reasons[-1]}. Not "
            "started again: change what fails (training.skip_ranges passes over bad data), or, if the cause "
            f"lay outside of the run and is mended, remove {self._path}"
        )
