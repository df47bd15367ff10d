"""What a save that failed means: the end of the run, or a warning (`checkpoint.on_save_error`)."""

from torchtitan_rd.checkpoint.config import CheckpointConfig
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.log import logger


class LostRankError(CheckpointError):
    """A rank died or was silent for too long in the midst of a save: no further save can succeed."""


class SaveErrors:
    """Counts the saves that failed; every rank counts the same.

    total: of this start of the run. in_a_row: since the last save that succeeded.
    """

    def __init__(self, config: CheckpointConfig, rank: int):
        self._ends_the_run = config.on_save_error == "raise"
        self._most = config.max_save_errors
        self._rank = rank
        self.total = self.in_a_row = 0

    def succeeded(self) -> None:
        self.in_a_row = 0

    def failed(self, error: CheckpointError, *, required: bool) -> None:
        """Warns, or raises `error`. required: there is no later save that would make up for this one."""
        self.total += 1
        self.in_a_row += 1
        if self._ends_the_run or required or isinstance(error, LostRankError):
            raise error
        if self._rank == 0:
            logger.warning("save error %d of %d in a row: %s", self.in_a_row, self._most, error)
        if self.in_a_row >= self._most:
            raise CheckpointError(
                f"{self.in_a_row} saves in a row have failed (checkpoint.max_save_errors); the last: {error}"
            ) from error
