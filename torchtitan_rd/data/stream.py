"""Reading a stream of the `datasets` library: one stream a rank,
whose position belongs to that number of ranks.
"""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan_rd.data.arrow import Encoder, check_columns, encode_row
from torchtitan_rd.data.read_errors import causes
from torchtitan_rd.data.windows import Window, cut, pack
from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

STREAM_START: dict[str, Any] = {"epoch": 0, "sample": 0, "offset": 0, "source": None}
"""Position of a stream: the next id is token `offset` of this rank's row number `sample` of `epoch`,
and `source` is the library's state just before that row (None: at the start of the epoch).
"""

_NOTHING = np.empty(0, np.uint8)


@dataclass(eq=False)
class StreamReader:
    """Reads windows from this rank's share of a stream.

    `table` must not be shuffled: what is in a shuffle buffer is not part of its state
    (huggingface/datasets#7444). What a resume costs depends on the library and the files.
    """

    name: str
    table: "datasets.IterableDataset"
    encoder: Encoder
    seq_len: int
    data_rank: int
    data_degree: int
    document_mask: bool = False

    def __post_init__(self) -> None:
        self.table = self.table.with_format("arrow")
        self._rows: Iterator[pa.Table] = iter(())
        self._position: dict[str, Any] | None = None
        self._tokens = _NOTHING

    def read(self, position) -> Window:
        """The window that begins at `position`, a dict like STREAM_START. Raises DataError."""
        if position != self._position:
            self._seek(position)
        offset = position["offset"]

        def take(count: int) -> np.ndarray:
            nonlocal offset
            if offset >= len(self._tokens):
                self._advance()
                offset = 0
            part = self._tokens[offset : offset + count]
            offset += len(part)
            return part

        parts = cut(take, self.seq_len)
        self._position = {
            "epoch": self._epoch,
            "sample": self._sample,
            "offset": offset,
            "source": self._source,
        }
        return pack(parts, self._position, self.document_mask, self.encoder.border_id)

    def close(self) -> None:
        """Ends the stream. A half-read parquet stream that is left to the interpreter's exit prints or aborts
        there (huggingface/datasets#7357).
        """
        self._rows = iter(())
        self._position = None
        self._tokens = _NOTHING
        gc.collect()

    def _seek(self, position: dict[str, Any]) -> None:
        self._begin(position["epoch"], position["sample"], position["source"])
        if not self._fetch():
            raise DataError(
                f"{self.name}: the stream of data rank {self.data_rank} ends before row {self._sample}"
            )

    def _advance(self) -> None:
        """Moves to the next row, of the next epoch if need be."""
        self._sample += 1
        while not self._fetch():
            if not self._found_tokens:
                raise DataError(
                    f"{self.name}: the share of data rank {self.data_rank} of {self.data_degree} is empty"
                )
            self._begin(self._epoch + 1, 0, None)

    def _begin(self, epoch: int, sample: int, source: dict[str, Any] | None) -> None:
        from datasets.distributed import split_dataset_by_node

        self._epoch = epoch
        self._sample = sample
        self._following = source
        self._found_tokens = False
        self._share = split_dataset_by_node(self.table, self.data_rank, self.data_degree)
        if source is not None:
            self._share.load_state_dict(source)
        self._rows = iter(self._share)

    def _fetch(self) -> bool:
        try:
            row = next(self._rows, None)
        except Exception as error:  # of the hub, the network, the file system and arrow: a library boundary
            raise DataError(
                f"{self.name}: after row {self._sample} of data rank {self.data_rank} the stream cannot be "
                f"read: {causes(error)}"
            ) from error
        if row is None:
            return False
        self._source, self._following = self._following, self._share.state_dict()
        where = f"{self.name}: row {self._sample} of data rank {self.data_rank}"
        check_columns(row.column_names, self.encoder.columns, self.name)
        self._tokens = encode_row(row, self.encoder, where)
        self._found_tokens |= len(self._tokens) > 0
        return True
