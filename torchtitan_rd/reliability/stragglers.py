"""Which rank keeps the others waiting, and for how long.

All ranks of a step end together, so a slow one does not show in the time of its steps. It shows in what
a rank does before it joins the first collective of a step: it waits for its data, collects garbage, is
kept from its core by another process, or sleeps in a driver. That time is its own, and the others wait for
the longest.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

from torchtitan_rd.log import logger

REMEMBERED = 20  # steps: a stall or two do not move their median
FEWEST = 5  # steps, before anything is said
SHARE = 0.1  # of a step: less is not worth a word
SHORTEST = 0.05  # seconds: so is less than this, in steps of milliseconds


class Stragglers:
    """One rank's own time, step by step, and its comparison with the others'. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._own: deque[float] = deque(maxlen=REMEMBERED)
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._begun: float | None = None  # when the present step began to look for its data
        self._is_own = False
        self._warned_of: tuple[int, float] | None = None

    def beat(self, step: int, phase: str) -> None:
        """The phase that begins, as the heartbeat is told. A step begins with `data`; the phase after it has
        the first collective. Validation and saving count in no step.
        """
        now = self._clock()
        if self._is_own and self._begun is not None:
            self._own.append(now - self._begun)
            self._is_own = False
        if phase == "update" and self._begun is not None:
            self._steps.append(now - self._begun)
        if phase == "data":
            self._begun, self._is_own = now, True

    def report(self, gather: Callable[[list[float]], list[list[float]] | None]) -> dict[str, float]:
        """For a row of metrics, on the rank to which `gather` brings the numbers of all; warns there of a
        rank that keeps the others waiting. Collective.

        slowest_rank: with the longest own time, the median of its last steps. slowest_rank_seconds: so much
        longer than the median rank's. Nothing for one rank.
        """
        own = statistics.median_low(self._own) if self._own else 0.0
        step = statistics.median(self._steps) if self._steps else 0.0
        gathered = gather([own, step, float(len(self._own))])
        if gathered is None or len(gathered) < 2:
            return {}
        rank, late = slowest([numbers[0] for numbers in gathered])
        step = max(numbers[1] for numbers in gathered)
        if min(numbers[2] for numbers in gathered) >= FEWEST:
            self._warn(rank, late, step)
        return {"slowest_rank": rank, "slowest_rank_seconds": late}

    def _warn(self, rank: int, late: float, step: float) -> None:
        """Once for each rank, and again where it has become twice as slow, or has been well in between."""
        if late < max(SHARE * step, SHORTEST):
            if self._warned_of is not None:
                logger.info("no rank keeps the others waiting any more")
            self._warned_of = None
            return
        if self._warned_of is not None and self._warned_of[0] == rank and late < 2 * self._warned_of[1]:
            return
        self._warned_of = (rank, late)
        logger.warning(
            "rank %d keeps the others waiting: %.2f s in each step of %.2f s, before its first collective "
            "(data, garbage collection, another process on its cores); heartbeat/rank_%d.json names its host",
            *(rank, late, step, rank),
        )


def slowest(own: Sequence[float]) -> tuple[int, float]:
    """The rank with the longest own time, and how much longer than the median rank (of two: the other) it
    takes, in seconds.
    """
    rank = max(range(len(own)), key=own.__getitem__)
    return rank, own[rank] - statistics.median_low(own)
