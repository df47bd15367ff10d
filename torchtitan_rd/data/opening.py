"""Opens what a run trains on as readers of this rank: a data set, a stream, or the sources of a mixture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan_rd.data import mixture as mixing
from torchtitan_rd.data.arrow import Encoder, TableSource
from torchtitan_rd.data.batch_dims import BatchDims
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.cursor import Cursor, Reader
from torchtitan_rd.data.file_lanes import file_order
from torchtitan_rd.data.prepacked import PackedEncoder
from torchtitan_rd.data.ranks import DataRanks
from torchtitan_rd.data.sources import (
    Cutting,
    Dataset,
    build_encoder,
    open_rows,
    open_source,
    prepare,
    source_fingerprint,
    stream_fingerprint,
)
from torchtitan_rd.data.stream import STREAM_START, StreamReader
from torchtitan_rd.data.tokenizer import Tokenizer
from torchtitan_rd.log import logger


@dataclass(frozen=True)
class DataSet:
    """A data set that is to be read. name: in a mixture, that of the source. section: of its keys."""

    keys: DatasetKeys
    row: Dataset
    name: str | None = None
    section: str = "training"


@dataclass(frozen=True)
class OpenData:
    """readers: one a lane of this rank, or one for a stream. start: where each begins.

    fingerprint: what the data is. record: what is read and what is not.
    """

    readers: Sequence[Reader]
    start: Any
    fingerprint: dict[str, Any]
    record: dict[str, Any]


@dataclass(frozen=True)
class Opening:
    """What all data sets of a loader are opened with; see `build_dataloader`. Methods raise DataError."""

    dims: BatchDims
    tokenizer: Tokenizer | None
    vocab_size: int
    seed: int
    split: str
    ranks: DataRanks | None

    def stream(self, data: DataSet) -> OpenData:
        """A data set that is streamed."""
        keys, encoder = self._pinned(data)
        table, found = open_rows(keys, data.row, encoder, self.split)
        if isinstance(encoder, PackedEncoder) and self.dims.data_rank == 0:
            encoder.warn_of_masks(table.column_names or (), keys.dataset)
        share = (self.dims.data_rank, self.dims.data_degree)
        reader = StreamReader(keys.dataset, table, encoder, keys.seq_len, *share, keys.document_mask)
        found.log(keys.dataset, "streamed")
        logger.info(
            "data: streaming; the position can be continued on %d data ranks only", self.dims.data_degree
        )
        return OpenData([reader], STREAM_START, stream_fingerprint(keys, encoder, found), found.record(None))

    def lanes(self, data: DataSet) -> OpenData:
        """An indexable data set; the first window of each lane of this rank is read."""
        keys, encoder = self._pinned(data)
        prepared = [] if self.ranks is None else self.ranks.prepared(keys, data.row, self.split, encoder)
        source, found = open_source(keys, data.row, encoder, self.seed, self.split, prepared)
        is_first = self.dims.data_rank == 0
        if is_first and isinstance(encoder, PackedEncoder) and isinstance(source, TableSource):
            encoder.warn_of_masks(source.table.column_names, keys.dataset)
        order = file_order(keys, found, len(source), self.dims.rows_per_stage)
        cutting = Cutting(keys, data.row.kind, len(source), self.dims.rows_per_stage, order)
        fingerprint = source_fingerprint(keys, source, found, cutting)

        samples = prepare(keys, source, cutting, fingerprint)
        readers = cutting.readers(samples, self.dims.lanes)
        for reader in readers:
            reader.read(Cursor())
        name = keys.dataset if data.name is None else f"{data.name} ({keys.dataset})"
        found.log(name, f"{len(source)} rows")
        return OpenData(readers, Cursor(), fingerprint, found.record(len(source)))

    def mixture(self, mixture: mixing.Mixture, sources: Sequence[DataSet]) -> OpenData:
        """The sources of a mixture, each as `lanes` opens it."""
        opened: dict[str, OpenData] = {}
        for source in sources:
            name = str(source.name)
            with mixing.errors_of(name):
                opened[name] = self.lanes(source)
        readers = [
            mixing.MixtureReader(mixture, lane, {name: one.readers[i] for name, one in opened.items()})
            for i, lane in enumerate(self.dims.lanes)
        ]
        return OpenData(
            readers,
            mixing.START,
            {"sources": {name: one.fingerprint for name, one in opened.items()}},
            {"sources": {name: one.record for name, one in opened.items()}},
        )

    def _pinned(self, data: DataSet) -> tuple[DatasetKeys, Encoder]:
        keys = data.keys
        if self.ranks is not None:
            keys = self.ranks.pinned(keys, data.row, self.split, data.name)
        return keys, build_encoder(keys, data.row.kind, self.tokenizer, self.vocab_size)
