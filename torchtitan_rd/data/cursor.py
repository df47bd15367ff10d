"""Where a run stands in an indexable data set, and how to read on from there.

Row g of the global batch is lane g: it has a cursor of its own and reads its own share of the samples. The sequence
of global batches is therefore a function of the seed and the step alone, whatever the ranks, the workers or the
accumulation; and since a cursor names the first id of the lane's next window, it is all the state there is.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from torchtitan_rd.errors import DataError

_MASK = (1 << 64) - 1


class Cursor(NamedTuple):
    """The first id of a lane's next window: token `offset` of the lane's unit number `index` of `epoch`."""

    epoch: int = 0
    index: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Row:
    """One sequence. ids: (S + 1,) integers; document_ids: (S,) int32 or None; position: of the row after this one."""

    ids: np.ndarray
    document_ids: np.ndarray | None
    position: object


class Source(Protocol):
    """An indexable data set, as ids. `name` is for messages; `border_id` ends a document inside a sample (or None)."""

    name: str
    border_id: int | None

    def __len__(self) -> int: ...

    def tokens(self, index: int) -> np.ndarray: ...


class LaneReader:
    """Cuts windows of `seq_len + 1` ids for one lane; a pure function of the cursor but for the cached last unit.

    A unit is a sample, or, where that would be fewer than `units_per_lane` for each lane, one of several nearly equal
    pieces of it: no lane is left without data, and with enough units the lanes' shares are of like length, so that no
    short document is repeated in one lane while another has not yet seen its own. In epoch e lane g reads the units at
    the positions g + e, g + e + num_lanes, ... of that epoch's order: the lanes together read every unit once, and the
    shift lets every lane see all the data in time even in file order.
    """

    def __init__(
        self,
        source: Source,
        lane: int,
        num_lanes: int,
        seq_len: int,
        shuffle_seed: int | None = None,
        document_mask: bool = False,
        units_per_lane: int = 1,
    ):
        self.source, self.lane, self.num_lanes = source, lane, num_lanes
        self.seq_len, self.shuffle_seed, self.document_mask = seq_len, shuffle_seed, document_mask
        self.pieces = -(-units_per_lane * num_lanes // len(source))
        self.num_units = len(source) * self.pieces
        self._cached: tuple[tuple[int, int] | None, np.ndarray] = (None, np.empty(0, np.uint8))

    def read(self, position) -> Row:
        """The window that begins at `position` (a Cursor, or its JSON form). Raises DataError."""
        epoch, index, offset = position
        parts, needed, empty = [], self.seq_len + 1, 0
        while needed:
            unit = self._unit(epoch, index)
            part = unit[offset : offset + needed]
            offset += len(part)
            needed -= len(part)
            if len(part):
                parts.append(part)
            empty = 0 if len(unit) else empty + 1
            if empty > self.num_units:
                self._require_tokens()
                empty = 0
            if offset == len(unit):
                index, offset = index + 1, 0
                if index == self._units_in(epoch):
                    epoch, index = epoch + 1, 0
        return join_parts(parts, Cursor(epoch, index, offset), self.document_mask, self.source.border_id)

    def close(self) -> None:
        """Lets go of the cached unit."""
        self._cached = (None, np.empty(0, np.uint8))

    def _require_tokens(self) -> None:
        """Bad luck of the shuffling ends by itself; data without any token would be searched for ever."""
        if not any(len(self.source.tokens(i)) for i in range(len(self.source))):
            raise DataError(f"{self.source.name}: none of its {len(self.source)} samples holds a token")

    def _first(self, epoch: int) -> int:
        return (self.lane + epoch) % self.num_lanes

    def _units_in(self, epoch: int) -> int:
        return -(-(self.num_units - self._first(epoch)) // self.num_lanes)

    def _unit(self, epoch: int, index: int) -> np.ndarray:
        key, unit = self._cached
        if key != (epoch, index):
            at = self._first(epoch) + index * self.num_lanes
            if self.shuffle_seed is not None:
                at = permuted(at, self.num_units, self.shuffle_seed, epoch)
            sample, piece = divmod(at, self.pieces)
            unit = self.source.tokens(sample)
            if self.pieces > 1:
                begin, end = (len(unit) * p // self.pieces for p in (piece, piece + 1))
                unit = unit[begin:end].copy()  # a view would keep the whole sample in memory
            self._cached = ((epoch, index), unit)
        return unit


def join_parts(parts: list[np.ndarray], position: object, document_mask: bool, border_id: int | None) -> Row:
    """One row of consecutive parts of samples. Documents are the parts, or end at `border_id` if that is given."""
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if not document_mask:
        return Row(ids, None, position)
    if border_id is not None:
        starts = np.zeros(len(ids) - 1, np.int32)
        starts[1:] = ids[:-2] == border_id
        return Row(ids, np.cumsum(starts, dtype=np.int32), position)
    documents = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
    return Row(ids, documents[:-1], position)


def permuted(position: int, size: int, seed: int, epoch: int) -> int:
    """The element at `position` of a pseudo-random permutation of range(size), in O(1) time and memory.

    A balanced Feistel network over the next power of four; values outside are sent through again until they fall
    inside ("cycle walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [_mix(_mix(_mix(seed) ^ epoch) ^ round_) for round_ in range(6)]
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half | right
        if position < size:
            return position


def _mix(value: int) -> int:
    """The output function of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
