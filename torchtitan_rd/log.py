"""The one logger. Rank 0 reports progress; every rank may warn, and says which rank it is."""

import logging
import sys

from torchtitan_rd.masking import mask_text

logger = logging.getLogger("torchtitan_rd")


class _RankFilter(logging.Filter):
    """Lets every record of rank 0 pass, and of other ranks only warnings and worse, marked with the rank."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank_mark = "" if self.rank == 0 else f"[rank {self.rank}] "
        return self.rank == 0 or record.levelno >= logging.WARNING


class _MaskingFormatter(logging.Formatter):
    """Hides credentials in whatever is logged, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


def init_logging(rank: int = 0, level: str = "INFO") -> None:
    """Sends the package's log to stderr.
    Calling it again (once the rank is known) replaces the earlier handler.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RankFilter(rank))
    handler.setFormatter(
        _MaskingFormatter("%(asctime)s %(levelname).1s %(rank_mark)s%(message)s", "%H:%M:%S")
    )
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
