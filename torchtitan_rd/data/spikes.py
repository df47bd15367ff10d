"""Spike counts (neurons x time bins) as tokens: for each time bin the separator, then one count a neuron.

    [[1, 0, 2],
     [0, 3, 0]]   ->   255 1 0   255 0 3   255 2 0

The separator is the last id of the vocabulary;
so a count must be smaller (eminorhan/gpt-neuro-arch; Neural Pile).

With `n_neurons` every recording has that many: of more, the first ones are kept; fewer are repeated in order,
0 1 2 0 1, until there are enough.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchtitan_rd.data.column_types import is_integer, is_list
from torchtitan_rd.data.cursor import piece_of
from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SPIKE_VOCAB_SIZE = 256


@dataclass(frozen=True)
class SpikeEncoder:
    """vocab_size: of the model; its last id separates the time bins. n_neurons: of each recording, made
    as the head of this file says; None: as many as it has.
    """

    vocab_size: int = SPIKE_VOCAB_SIZE
    column: str = "spike_counts"
    border_id: int | None = None
    n_neurons: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def read(self, cell: "pa.Array", where: str) -> np.ndarray:
        """One row's counts (N, T), without a copy, from an arrow array of length 1:
        lists of lists of integers.
        """
        return read_matrix(cell, where)

    def check_type(self, column: "pa.ChunkedArray", name: str) -> None:
        """Raises DataError unless the column can hold counts. Reads no row."""
        # Array2D of `datasets` is an extension type.
        outer = getattr(column.type, "storage_type", column.type)
        inner = outer.value_type if is_list(outer) else None
        if inner is None or not is_list(inner) or not is_integer(inner.value_type):
            raise DataError(
                f"{name}: column {self.column!r} holds {column.type}; "
                f"expected lists (neurons) of lists (time bins) of integers"
            )

    def check(self, counts: np.ndarray, where: str) -> int:
        """The number of counts (N, T), those repeated included.
        Raises DataError if one that is kept is out of range.
        """
        separator = self.vocab_size - 1
        counts = counts[: self.n_neurons]
        if counts.size and (counts.max() >= separator or counts.min() < 0):
            neuron, bin_ = np.argwhere((counts >= separator) | (counts < 0))[0]
            raise DataError(
                f"{where}, neuron {neuron}, time bin {bin_}: spike count {counts[neuron, bin_]} is not in "
                f"0..{separator - 1} ({separator} separates the time bins): "
                f"clip the counts, use shorter bins, or raise model.vocab_size"
            )
        return counts.shape[1] * self._neurons_of(len(counts))

    def encode(self, counts: np.ndarray, where: str) -> np.ndarray:
        """Counts (N, T) -> ids (T * (N + 1),), in the smallest unsigned type that holds the separator.
        N: n_neurons if that is given.
        """
        return self.piece(counts, where, 0, 1)

    def piece(self, counts: np.ndarray, where: str, part: int, parts: int) -> np.ndarray:
        """The ids of one of `parts` pieces of a recording. A piece is whole time bins,
        and no other bin is encoded.
        """
        self.check(counts, where)
        counts = piece_of(counts.T, part, parts).T
        present, bins = counts.shape
        neurons = self._neurons_of(present)
        separator = self.vocab_size - 1
        if not neurons:
            return np.empty(0, np.min_scalar_type(separator))
        ids = np.empty((bins, neurons + 1), np.min_scalar_type(separator))
        ids[:, 0] = separator
        for first in range(0, neurons, present):
            copied = min(present, neurons - first)
            ids[:, 1 + first : 1 + first + copied] = counts[:copied].T
        return ids.reshape(-1)

    def _neurons_of(self, present: int) -> int:
        """Of a recording that has so many; none of none."""
        return present if self.n_neurons is None or not present else self.n_neurons


def read_matrix(cell: "pa.Array", where: str) -> np.ndarray:
    """An arrow array of length 1 that holds a list of equally long lists of integers -> (rows, columns),
    no copy.
    """
    import pyarrow.compute as pc

    outer = getattr(cell, "storage", cell)  # Array2D of `datasets` is an extension type
    rows = outer.flatten() if is_list(outer.type) else outer
    values = rows.flatten() if is_list(rows.type) else rows
    if outer is rows or rows is values or not is_integer(values.type):
        raise DataError(
            f"{where}: expected lists (neurons) of lists (time bins) of integers, found {cell.type}"
        )
    if outer.null_count or rows.null_count or values.null_count:
        raise DataError(f"{where}: holds missing values (nulls)")
    lengths = pc.list_value_length(rows).to_numpy(zero_copy_only=False)
    if len(lengths) == 0:
        return np.empty((0, 0), np.uint8)
    if (lengths != lengths[0]).any():
        neuron = int(np.argmax(lengths != lengths[0]))
        raise DataError(
            f"{where}: neuron {neuron} has {lengths[neuron]} time bins, but neuron 0 has {lengths[0]}"
        )
    return values.to_numpy().reshape(len(lengths), lengths[0])


@dataclass(frozen=True)
class SyntheticRecordings:
    """Made-up recordings: 10..999 neurons, 100..1999 time bins;
    a random tenth of the neurons always counts 1.

    Sample i is a function of (seed, i) alone. The length is only large.
    """

    seed: int

    def __len__(self) -> int:
        return 1 << 32

    def __getitem__(self, index: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, index))
        neurons, bins = generator.integers(10, 1000), generator.integers(100, 2000)
        counts = np.zeros((neurons, bins), np.uint8)
        counts[generator.choice(neurons, neurons // 10, replace=False)] = 1
        return counts
