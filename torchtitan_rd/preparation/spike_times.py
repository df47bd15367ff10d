"""Spike times as whole nanoseconds, and what is read of a session.

Bins that are counted in binary fractions of a second put spikes that lie on an edge now on one side of it and
now on the other. Integers are converted exactly, all others are rounded to the nearest nanosecond; recorders
sample thousands of times more slowly.
"""

import math
from dataclasses import dataclass

import numpy as np

from torchtitan_rd.errors import DataError

NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
END = 9 * 10**18  # less than int64 holds: 285 years


@dataclass(frozen=True)
class SpikeTimes:
    """units: names; trains: the spikes of each, (spikes,) int64 in nanoseconds, ascending.
    windows: what of the session is wanted, as pairs of nanoseconds; None: all of it.
    """

    units: list[str]
    trains: list[np.ndarray]
    windows: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class SpikeCounts:
    """units: names; counts: (units, bins), of any integer type."""

    units: list[str]
    counts: np.ndarray


def nanoseconds(times: np.ndarray, scale: int, where: str, earliest: int = 0) -> np.ndarray:
    """Times (spikes,) in multiples of `scale` nanoseconds -> int64, ascending.

    earliest: in nanoseconds; below 0 for a format whose time 0 lies within a session. Raises DataError for
    what is no time: not a number, before `earliest`, not finite, or later than in 285 years.
    """
    if times.ndim != 1 or (times.dtype.kind not in "iuf" and len(times)):
        raise DataError(
            f"{where}: holds {times.dtype} of shape {times.shape}; expected one list of spike times"
        )
    bad = ~((times >= earliest / scale) & (times < END / scale)) if len(times) else np.zeros(0, bool)
    if bad.any():
        spike = int(np.argmax(bad))
        raise DataError(f"{where}, spike {spike}: {_complaint(times[spike].item())}")
    if times.dtype.kind in "iu":
        return np.sort(times.astype(np.int64) * scale)
    return np.sort(np.rint(times.astype(np.float64) * scale).astype(np.int64))


def time_of(text: str, scale: int, where: str) -> int:
    """The same of one number that is written out."""
    try:
        time: int | float = int(text)
    except ValueError:
        try:
            time = float(text)
        except ValueError:
            raise DataError(f"{where}: {text.strip()!r:.60} is no time") from None
    if not 0 <= time < END / scale:
        raise DataError(f"{where}: {_complaint(time)}")
    return time * scale if isinstance(time, int) else round(time * scale)


def _complaint(time: int | float) -> str:
    if not math.isfinite(time):
        return f"the time {time} is not finite"
    if time < -END / NANOSECONDS["s"]:
        return f"the time {time} is too early: is it in another --unit?"
    if time < 0:
        return f"the time {time} is negative: times count from the beginning of the session, shift them"
    return f"the time {time} is too large: is it in another --unit?"
