"""Packed rows in parquet: one column `input_ids`, lists of equal length; and what tells them apart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchtitan_rd.data.column_types import is_integer, is_list
from torchtitan_rd.errors import DataError
from torchtitan_rd.preparation.manifest import Output, describe

COLUMN = "input_ids"
ROWS_TOGETHER = 1024  # of one row group
_MASK = (1 << 64) - 1


class RowWriter:
    """Writes one file of rows, which appears when it is complete; without rows there is none.

    Row groups do not depend on how rows arrive, so neither do the bytes. It holds the rows of one group, and
    nothing of the arrays that it was given.
    """

    def __init__(self, output: Output, path: Path):
        self.rows = 0
        self.digest = 0  # see `digest_of_rows`
        self._output, self._path = output, path
        self._staged = output.stage(path)
        self._file: BinaryIO | None = None
        self._writer: Any = None
        self._group = np.empty((0, 0), np.int32)  # made for the width of the first rows
        self._count = 0  # of its rows that are filled

    def write(self, rows: np.ndarray) -> None:
        """rows: (N, width) integers, each time of the same width."""
        if len(rows) and not len(self._group):
            self._group = np.empty((ROWS_TOGETHER, rows.shape[1]), np.int32)
        while len(rows):
            part, rows = np.split(rows, [ROWS_TOGETHER - self._count])
            self._group[self._count : self._count + len(part)] = part
            self._count += len(part)
            if self._count == ROWS_TOGETHER:
                self._flush()

    def commit(self) -> dict[str, Any] | None:
        """Finishes the file. Returns its rows, size and sha256, or None if there is none."""
        if self._count:
            self._flush()
        if self._file is None:
            return None
        self._writer.close()
        self._file.close()
        self._output.commit(self._staged, self._path)
        return {"rows": self.rows, **describe(self._path)}

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, self._count = self._group[: self._count], 0
        ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
        column = pa.ListArray.from_arrays(pa.array(ends), pa.array(rows.reshape(-1)))
        table = pa.table({COLUMN: column})
        if self._file is None:
            self._file = self._staged.open("wb")
            self._writer = pq.ParquetWriter(
                self._file, table.schema, compression="zstd", write_statistics=False
            )
        self._writer.write_table(table)

        self.rows += len(rows)
        self.digest = (self.digest + digest_of_rows(rows)) & _MASK


def digest_of_rows(rows: np.ndarray) -> int:
    """A digest of rows as a multiset: the sum of theirs, whatever their order."""
    import xxhash

    return sum(xxhash.xxh3_64_intdigest(row) for row in np.ascontiguousarray(rows, np.int32)) & _MASK


def read_rows(file: Path) -> Iterator[np.ndarray]:
    """The rows of a file as (N, width) int32, a part at a time.

    Raises DataError, naming file and row, for another column, other values, or rows of unequal length.
    """
    import pyarrow.compute as pc

    parquet, kind = _opened(file)
    done, width = 0, None
    for batch in parquet.iter_batches(ROWS_TOGETHER, columns=[COLUMN]):
        column = batch.column(COLUMN)
        values = column.flatten()
        if column.null_count or values.null_count:
            raise DataError(f"{file}: column {COLUMN!r} holds nulls; expected lists of integers")

        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if len(lengths):
            width = int(lengths[0]) if width is None else width
            if (wrong := np.flatnonzero(lengths != width)).size:
                raise DataError(
                    f"{file}: row {done + wrong[0]}: has {lengths[wrong[0]]} ids, and those before it have "
                    f"{width}; packed rows are all of one length"
                )
            ids = values.to_numpy(zero_copy_only=False)
            if kind.bit_width > 31 and ids.size and (ids.max() > 2**31 - 1 or ids.min() < -(2**31)):
                raise DataError(f"{file}: rows {done}..: an id does not fit into 32 bits")
            yield ids.astype(np.int32, copy=False).reshape(len(lengths), width)
        done += len(lengths)


def count_rows(file: Path) -> int:
    """Raises DataError, naming the file, unless it is parquet with such a column."""
    return _opened(file)[0].metadata.num_rows


def _opened(file: Path) -> tuple[Any, Any]:
    """-> the parquet file, and the type of its ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file, pre_buffer=False)  # which would keep the whole file in memory
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: is no readable parquet file: {error}") from None
    schema = parquet.schema_arrow
    if COLUMN not in schema.names:
        raise DataError(f"{file}: has no column {COLUMN!r}, only {', '.join(schema.names)}")
    kind = schema.field(COLUMN).type
    if not is_list(kind) or not is_integer(kind.value_type):
        raise DataError(f"{file}: column {COLUMN!r} holds {kind}; expected lists of integers")
    return parquet, kind.value_type
