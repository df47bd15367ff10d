"""Where a run stands in an indexable data set, and how to read on from there.

Row g of the global batch is lane g: it has a cursor of its own and reads its own share of the samples.
The sequence of global batches is therefore a function of the seed and the step alone, whatever the ranks,
the workers or the accumulation; and since a cursor names the first id of the lane's next window, it is
all the state there is.

A reader keeps no cursor: it is given one and returns the next. `BatchLoader` keeps those of its rank's
lanes, as of the last step that it handed out; a checkpoint holds those of all lanes, in the order of
lanes (`merge_states`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from torchtitan_rd.data.windows import Window, cut, pack
from torchtitan_rd.errors import DataError

_MASK = (1 << 64) - 1
_NOTHING = np.empty(0, np.uint8)

Items = TypeVar("Items", np.ndarray, range)


class Cursor(NamedTuple):
    """The first id of a lane's next window: token `offset` of the lane's unit number `unit` of `epoch`."""

    epoch: int = 0
    unit: int = 0
    offset: int = 0


class Reader(Protocol):
    """Reads the window at a position (JSON-able); it holds the position after it."""

    def read(self, position: Any) -> Window: ...

    def close(self) -> None: ...


class Source(Protocol):
    """An indexable data set, as ids. `name` is for messages;
    `border_id` ends a document inside a sample (or None).
    """

    name: str
    border_id: int | None

    def __len__(self) -> int: ...

    def tokens(self, index: int) -> np.ndarray: ...

    def piece(self, index: int, part: int, parts: int) -> np.ndarray:
        """Piece number `part` of `parts` nearly equal ones, which together are `tokens(index)`."""
        ...


class FileOrder:
    """The order of rows in which a lane owns whole files (`training.lane_per_file`).

    Share g of `shares` owns the files g, g + shares, ... It reads row 0 of each of them in turn, then row 1
    of each, and so on; a file that has ended is passed over. With as many files as shares, all lanes together
    read row s of every file at their s-th reading.
    """

    def __init__(self, rows_in_files: Sequence[int], shares: int):
        """rows_in_files: of every file, at least 1, in the order in which their rows are numbered."""
        self.shares = shares
        self.rows_in_files = list(rows_in_files)
        self._rows = np.asarray(rows_in_files, np.int64)
        self._first_row = np.cumsum(self._rows) - self._rows
        self._found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows_in(self, share: int) -> int:
        """How many rows the files of a share hold together."""
        return int(self._rows[share :: self.shares].sum())

    def row(self, share: int, index: int) -> int:
        """The number, among all rows, of the row that `share` reads after `index` others."""
        begins, read_before = self._stretches(share)
        if index >= read_before[-1]:
            raise IndexError(f"share {share} has only {self.rows_in(share)} rows")
        stretch = np.searchsorted(read_before, index, side="right") - 1

        rows, first_row = self._rows[share :: self.shares], self._first_row[share :: self.shares]
        going_on = first_row[rows > begins[stretch]]
        round_, file = divmod(index - int(read_before[stretch]), len(going_on))
        return int(going_on[file] + begins[stretch]) + round_

    def _stretches(self, share: int) -> tuple[np.ndarray, np.ndarray]:
        """Rounds in which the same files of a share still have a row: the first round of each stretch, and
        the rows that were read before it. The last one begins when all files have ended.
        """
        if share not in self._found:  # once: at every row it would sort the lengths of all files
            rows = np.sort(self._rows[share :: self.shares])
            begins = np.unique(np.append(rows, 0))
            files_left = len(rows) - np.searchsorted(rows, begins, side="right")
            read_before = np.append(0, np.cumsum(np.diff(begins) * files_left[:-1]))
            self._found[share] = (begins, read_before)
        return self._found[share]


@dataclass(eq=False)
class LaneReader:
    """Reads the windows of one lane; a pure function of the cursor but for the cached last unit.

    A unit is a sample, or, where that would be fewer than `units_per_lane` for each lane, one of several
    nearly equal pieces of it: no lane is left without data, and with enough units the lanes' shares are
    of like length, so that no short document is repeated in one lane while another has not yet seen its
    own. In epoch e lane g reads the units at the positions g + e, g + e + num_lanes, ... of that epoch's
    order: the lanes together read every unit once, and the shift lets every lane see all the data in
    time even in file order. With `files` the units are rows, and in epoch e lane g reads the share g + e of
    the files, in their order.

    skip_ranges: samples of which the source is known to give nothing (`SkippingSource`). An epoch ends with
    the last unit of the share that is not one of them: `max_epochs` of a mixture looks at the epoch before
    anything more is read. Inside a share they keep their places, so that a resume may unset them.
    """

    source: Source
    lane: int
    num_lanes: int
    seq_len: int
    shuffle_seed: int | None = None
    document_mask: bool = False
    units_per_lane: int = 1
    files: FileOrder | None = None
    skip_ranges: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        self.pieces = pieces_per_sample(len(self.source), self.num_lanes, self.units_per_lane)
        self.num_units = len(self.source) * self.pieces
        self._cached: tuple[tuple[int, int] | None, np.ndarray] = (None, _NOTHING)

    def read(self, position) -> Window:
        """The window that begins at `position` (a Cursor, or its JSON form). Raises DataError."""
        epoch, index, offset = position
        empty = 0  # units in a row without a token

        def take(count: int) -> np.ndarray:
            nonlocal epoch, index, offset, empty
            unit = self._unit(epoch, index)
            part = unit[offset : offset + count]
            offset += len(part)
            empty = 0 if len(unit) else empty + 1
            if empty > self.num_units:
                self._require_tokens()
                empty = 0
            # More only where the unit is skipped now and was not when the position was saved.
            if offset >= len(unit):
                epoch, index = self._after(epoch, index)
                offset = 0
            return part

        parts = cut(take, self.seq_len)
        return pack(parts, Cursor(epoch, index, offset), self.document_mask, self.source.border_id)

    def close(self) -> None:
        """Lets go of the cached unit."""
        self._cached = (None, _NOTHING)

    def _require_tokens(self) -> None:
        """Bad luck of the shuffling ends by itself; data without any token would be searched for ever."""
        if not any(len(self.source.tokens(i)) for i in range(len(self.source))):
            raise DataError(f"{self.source.name}: none of its {len(self.source)} samples holds a token")

    def _after(self, epoch: int, index: int) -> tuple[int, int]:
        """Epoch and number of the unit that is read after this one."""
        after = (epoch, index + 1) if index + 1 < self._units_in(epoch) else (epoch + 1, 0)
        # After a unit that is skipped itself, that was asked when the one before it ended.
        if self.skip_ranges and not self._is_skipped(epoch, index):
            while self._skips_the_rest(*after):
                after = (after[0] + 1, 0)
        return after

    def _skips_the_rest(self, epoch: int, index: int) -> bool:
        """Whether the share is skipped from this unit on."""
        return all(self._is_skipped(epoch, unit) for unit in range(index, self._units_in(epoch)))

    def _is_skipped(self, epoch: int, index: int) -> bool:
        return is_in(self.skip_ranges, self._at(epoch, index) // self.pieces)

    def _first(self, epoch: int) -> int:
        return (self.lane + epoch) % self.num_lanes

    def _units_in(self, epoch: int) -> int:
        if self.files is not None:
            return self.files.rows_in(self._first(epoch))
        return -(-(self.num_units - self._first(epoch)) // self.num_lanes)

    def _unit(self, epoch: int, index: int) -> np.ndarray:
        key, unit = self._cached
        if key != (epoch, index):
            sample, piece = divmod(self._at(epoch, index), self.pieces)
            whole = self.pieces == 1
            unit = self.source.tokens(sample) if whole else self.source.piece(sample, piece, self.pieces)
            self._cached = ((epoch, index), unit)
        return unit

    def _at(self, epoch: int, index: int) -> int:
        """The number of a unit among all units."""
        if self.files is not None:
            return self.files.row(self._first(epoch), index)
        position = self._first(epoch) + index * self.num_lanes
        if self.shuffle_seed is None:
            return position
        return permuted(position, self.num_units, self.shuffle_seed, epoch)


def pieces_per_sample(samples: int, num_lanes: int, units_per_lane: int) -> int:
    """Into how many pieces each sample is cut, so that every lane has `units_per_lane`; 1: not at all."""
    return -(-units_per_lane * num_lanes // samples)


def piece_of(items: Items, part: int, parts: int) -> Items:
    """Piece number `part` of `parts` nearly equal ones, along the first axis; a view."""
    begin, end = (len(items) * p // parts for p in (part, part + 1))
    return items[begin:end]


class SkippingSource:
    """A source in which some samples are as if they were empty, and are never read;
    all others keep their numbers.

    ranges: pairs of the first and the last number to skip.
    """

    def __init__(self, source: Source, ranges: list[list[int]]):
        self.source, self.ranges = source, ranges
        self.name, self.border_id = source.name, source.border_id

    def __len__(self) -> int:
        return len(self.source)

    def tokens(self, index: int) -> np.ndarray:
        return _NOTHING if is_in(self.ranges, index) else self.source.tokens(index)

    def piece(self, index: int, part: int, parts: int) -> np.ndarray:
        return _NOTHING if is_in(self.ranges, index) else self.source.piece(index, part, parts)


def is_in(ranges: Sequence[Sequence[int]], index: int) -> bool:
    """Whether a number lies in one of the pairs of the first and the last one."""
    return any(first <= index <= last for first, last in ranges)


def permuted(position: int, size: int, seed: int, epoch: int) -> int:
    """The element at `position` of a pseudo-random permutation of range(size), in O(1) time and memory.

    A balanced Feistel network over the next power of four; values outside are sent through again until they
    fall inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [mixed(seed, epoch, round_) for round_ in range(6)]
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half | right
        if position < size:
            return position


def mixed(*numbers: int) -> int:
    """A pseudo-random number of 64 bits that a few whole numbers decide."""
    state = _mix(numbers[0])
    for number in numbers[1:]:
        state = _mix(state ^ number)
    return state


def _mix(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
