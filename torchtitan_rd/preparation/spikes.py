"""From spike times to rows of the Neural Pile: counts in time bins, long sessions cut, a test set split off.

Bin b of a session that begins at `start` covers the times from start + b * bin, included, to
start + (b + 1) * bin, excluded: what numpy.histogram counts with the same edges, but for a spike that lies
on the very last edge, which numpy counts in the bin before it and which here belongs to none.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from torchtitan_rd.data.spikes import SPIKE_VOCAB_SIZE
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.preparation.spike_times import END, NANOSECONDS, SpikeCounts, SpikeTimes

LARGEST_COUNT = SPIKE_VOCAB_SIZE - 2  # the last id separates the time bins
# A thousand rows of the usual size: a session that is longer has most likely times in another unit.
MOST_TOKENS = 10**10
# Behind the last time that there can be, the bin that holds it still ends within int64.
_LONGEST_BIN = 10**17


@dataclass(frozen=True)
class Settings:
    """How recordings become rows.

    bin_ms: length of a time bin. unit: of the times (recordings.py). start, stop: seconds, of every session;
    None: the bin of the first spike, counted from time 0, and that of the last. clip: counts over 254 become
    254. where, intervals: see nwb.py. max_tokens: of a row, (neurons + 1) * bins. test_share: of the rows.
    """

    bin_ms: float = 20.0
    unit: str = "s"
    start: float | None = None
    stop: float | None = None
    clip: bool = False
    where: dict[str, list[str]] = field(default_factory=dict)
    intervals: str | None = None
    max_tokens: int = 10_000_000
    test_share: float = 0.01
    seed: int = 0

    def __post_init__(self):
        latest = END // NANOSECONDS["s"]
        longest = _LONGEST_BIN // NANOSECONDS["ms"]

        # What is wrong -> how it is told.
        remarks = (
            (
                not 1 <= self.bin_ns <= _LONGEST_BIN,
                f"--bin-ms must be a time above 0, and at most {longest}",
            ),
            (self.unit not in NANOSECONDS, f"--unit must be one of {', '.join(NANOSECONDS)}"),
            (not 0 <= self.test_share < 1, "--test-share must be at least 0 and below 1"),
            (self.max_tokens < 2, "--max-tokens must be at least 2"),
            # The part of each session.
            (
                self.start is not None and not 0 <= self.start <= latest,
                f"--start must be a number of seconds from 0 to {latest}",
            ),
            (
                self.stop is not None and not (self.start or 0) < self.stop <= latest,
                f"--stop must be later than --start, and at most {latest}",
            ),
            (
                self.intervals is not None and (self.start is not None or self.stop is not None),
                "--intervals says where recordings begin and end: leave out --start and --stop",
            ),
        )
        if problems := [text for wrong, text in remarks if wrong]:
            raise ConfigError("\n".join(problems))

    @property
    def bin_ns(self) -> int:
        length = self.bin_ms * NANOSECONDS["ms"]
        return round(length) if math.isfinite(length) else 0


@dataclass
class Facts:
    """What became of a session. spikes: in its files; outside: of these, in no bin; clipped: bins whose count
    was lowered; bins: time bins; tokens: neurons and separators times bins. silent: units without a spike.
    """

    source: str
    session: str
    units: int
    silent: list[str]
    spikes: int
    outside: int = 0
    clipped: int = 0
    bins: int = 0
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Row:
    """counts: (neurons, bins) uint8. first_bin: its number in the session."""

    session: str
    first_bin: int
    counts: np.ndarray


def rows_of(found: SpikeTimes | SpikeCounts, facts: Facts, settings: Settings, where: str) -> Iterator[Row]:
    """The rows of a session, in order, one in memory at a time; adds what became of them to `facts`.

    where: what messages call the session. Raises ConfigError, and DataError for counts out of range.
    """
    neurons = len(found.units)
    counted = 0
    for number, (start, bins) in enumerate(_spans(found, settings, where)):
        name = facts.session
        if isinstance(found, SpikeTimes) and found.windows is not None:
            name = f"{name}/{settings.intervals}-{number}"
        for begin, end in cut(bins, neurons, settings.max_tokens):
            if isinstance(found, SpikeTimes):
                counts = count(found.trains, start + begin * settings.bin_ns, settings.bin_ns, end - begin)
            else:
                counts = found.counts[:, begin:end]
            counted += int(counts.sum(dtype=np.int64))
            facts.clipped += _check(counts, found.units, begin, settings, where)
            # As uint8, since int8 cannot hold the bound.
            yield Row(name, begin, np.minimum(counts, np.uint8(LARGEST_COUNT)).astype(np.uint8))

            facts.rows += 1
            facts.bins += end - begin
            facts.tokens += (neurons + 1) * (end - begin)
    facts.outside = max(facts.spikes - counted, 0)
    if not facts.rows:
        raise DataError(f"{where}: nothing of it is as long as one bin of {settings.bin_ms} ms")


def facts_of(found: SpikeTimes | SpikeCounts, source: str, session: str) -> Facts:
    """What there is before it is counted."""
    if isinstance(found, SpikeTimes):
        spikes = np.array([len(train) for train in found.trains])
    else:
        spikes = found.counts.sum(axis=1, dtype=np.int64)
    silent = [found.units[number] for number in np.flatnonzero(spikes == 0)]
    return Facts(source, session, len(found.units), silent, int(spikes.sum()))


def _spans(found: SpikeTimes | SpikeCounts, settings: Settings, where: str) -> list[tuple[int, int]]:
    """(begin in ns, number of bins) of what is read of a session."""
    bin_ns = settings.bin_ns
    if isinstance(found, SpikeCounts):
        if settings.start is not None or settings.stop is not None:
            raise ConfigError(f"{where}: holds counts, not times: --start and --stop have no meaning")
        return [(0, found.counts.shape[1])]
    if found.windows is not None:
        return [(start, (stop - start) // bin_ns) for start, stop in found.windows]

    spiking = [train for train in found.trains if len(train)]
    if not spiking and (settings.start is None or settings.stop is None):
        raise DataError(
            f"{where}: none of its {len(found.units)} units has a spike, so that it has no beginning and no "
            "end: give --start and --stop, or leave it out"
        )
    if settings.start is not None:
        start = round(settings.start * NANOSECONDS["s"])
    else:
        start = min(int(train[0]) for train in spiking) // bin_ns * bin_ns
    if settings.stop is not None:
        bins = (round(settings.stop * NANOSECONDS["s"]) - start) // bin_ns
    else:
        bins = (max(int(train[-1]) for train in spiking) - start) // bin_ns + 1

    if bins <= 0:
        raise DataError(f"{where}: has no spike between --start and --stop, or none after --start")
    if (len(found.units) + 1) * bins > MOST_TOKENS:
        raise DataError(
            f"{where}: lasts {bins * bin_ns / NANOSECONDS['s']:,.0f} seconds, {bins:,} bins of "
            f"{settings.bin_ms} ms: is --unit {settings.unit} right? If so, cut it with --start and --stop"
        )
    return [(start, bins)]


def cut(bins: int, neurons: int, max_tokens: int) -> list[tuple[int, int]]:
    """The fewest ranges of time bins that hold at most max_tokens tokens each, separators included; of equal
    length, to one bin. One bin alone may hold more.
    """
    parts = -(-bins // max(max_tokens // (neurons + 1), 1))
    return [(bins * part // parts, bins * (part + 1) // parts) for part in range(parts)]


def count(trains: Sequence[np.ndarray], start: int, bin_ns: int, bins: int) -> np.ndarray:
    """Ascending int64 times -> counts (neurons, bins) int64 in `bins` bins from `start` on."""
    counts = np.zeros((len(trains), bins), np.int64)
    for neuron, train in enumerate(trains):
        first, last = np.searchsorted(train, [start, start + bins * bin_ns])
        counts[neuron] = np.bincount((train[first:last] - start) // bin_ns, minlength=bins)
    return counts


def _check(counts: np.ndarray, units: list[str], begin: int, settings: Settings, where: str) -> int:
    """How many counts must be clipped. Raises DataError if one is negative, or too large and not to be
    clipped.
    """
    bad = (counts < 0) if settings.clip else (counts < 0) | (counts > LARGEST_COUNT)
    if bad.any():
        neuron, bin_ = np.argwhere(bad)[0]
        remedy = "" if counts[neuron, bin_] < 0 else ": use shorter bins (--bin-ms), or --clip"
        raise DataError(
            f"{where}: unit {units[neuron]}, time bin {begin + bin_}: the count {counts[neuron, bin_]} "
            f"is not in 0..{LARGEST_COUNT} ({LARGEST_COUNT + 1} separates the time bins){remedy}"
        )
    return int((counts > LARGEST_COUNT).sum())


def shuffled(rows: Sequence[tuple[str, str, int]], seed: int) -> list[int]:
    """The numbers of rows (source, session, first bin) in an order drawn from the seed.

    A row's place comes from a digest of its name: no version of a generator and no order of the inputs
    changes it.
    """

    def drawn(number: int) -> bytes:
        return hashlib.sha256(repr((seed, *rows[number])).encode()).digest()

    return sorted(range(len(rows)), key=drawn)


def split(order: list[int], share: float) -> tuple[list[int], list[int]]:
    """-> (train, test) of rows in shuffled order. At least one is held out, where there are two and any shall
    be.
    """
    held_out = round(share * len(order))
    if share > 0 and len(order) > 1:
        held_out = min(max(held_out, 1), len(order) - 1)
    return order[held_out:], order[:held_out]
