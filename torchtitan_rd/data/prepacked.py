"""Rows that were tokenised and packed beforehand: each holds exactly `seq_len + 1` ids and is one window."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torchtitan_rd.data.column_types import is_integer, is_list
from torchtitan_rd.data.cursor import piece_of
from torchtitan_rd.data.text import check_ids
from torchtitan_rd.errors import DataError
from torchtitan_rd.log import logger

if TYPE_CHECKING:
    import pyarrow as pa

# Columns in which other programs say what of a row is learned.
_MASKS = ("labels", "attention_mask", "loss_mask", "completion_mask", "assistant_masks")


@dataclass(frozen=True)
class PackedEncoder:
    """Padding, pad_id, is read as `border_id` and is no label (windows.py says how that is stored).
    pad_id needs a border_id.
    """

    seq_len: int
    vocab_size: int
    pad_id: int | None = None
    border_id: int | None = None
    column: str = "input_ids"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def read(self, cell: "pa.Array", where: str) -> np.ndarray:
        """One row's ids from an arrow array of length 1: a list of integers."""
        values = cell.flatten() if is_list(cell.type) else cell
        if values is cell or not is_integer(values.type) or values.null_count or cell.null_count:
            raise DataError(
                f"{where}: column {self.column!r} holds {cell.type}; expected a list of integers, no nulls"
            )
        return values.to_numpy()

    def check_type(self, column: "pa.ChunkedArray", name: str) -> None:
        """Raises DataError unless the column can hold lists of ids. Reads no row."""
        if not is_list(column.type) or not is_integer(column.type.value_type):
            raise DataError(f"{name}: column {self.column!r} holds {column.type}; expected lists of integers")

    def warn_of_masks(self, columns: Sequence[str], name: str) -> None:
        """Says which of the columns that a data set has would tell what is learned, and are not read."""
        if unread := [column for column in columns if column in _MASKS]:
            logger.warning(
                "data: %s: packed rows are read from %r alone, and %s beside it are not: every id is learned "
                "but padding (training.pad_id)",
                *(name, self.column, ", ".join(unread)),
            )

    def check(self, row: np.ndarray, where: str) -> int:
        """The number of ids. Raises DataError unless they are as many as a window has,
        and in the vocabulary.
        """
        return len(self.encode(row, where))

    def piece(self, row: np.ndarray, where: str, part: int, parts: int) -> np.ndarray:
        """One of `parts` pieces of a row."""
        return piece_of(self.encode(row, where), part, parts)

    def encode(self, row: np.ndarray, where: str) -> np.ndarray:
        """A row of `seq_len + 1` ids, padding as the complement of border_id."""
        if len(row) != self.seq_len + 1:
            raise DataError(
                f"{where}: has {len(row)} ids, but training.seq_len = {self.seq_len} needs "
                f"{self.seq_len + 1}; set training.seq_len, or pack the data for this length"
            )
        if self.pad_id is None or self.border_id is None:
            check_ids(row, self.vocab_size, where)
            return row
        padding = self._padding(row, self.pad_id)
        check_ids(np.where(padding, 0, row), self.vocab_size, where)
        return np.where(padding, ~self.border_id, row.astype(np.int64))

    def _padding(self, row: np.ndarray, pad_id: int) -> np.ndarray:
        """Which ids are padding: all that are pad_id. Where that is border_id too, as in data padded with
        eos, those at the row's end, but for the first of them, which ends the last document.
        """
        found = row == pad_id
        if pad_id == self.border_id:
            others = np.flatnonzero(~found)
            found[: others[-1] + 2 if len(others) else 1] = False
        return found
