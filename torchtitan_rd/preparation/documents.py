"""The documents of one or several sources, in a seeded order that is computed and never stored: texts, and
conversations, which are lists of messages.

A source is an arrow table that is mapped from disk (data/arrow.py). Its documents are entries: floor(weight)
copies of every row, and for the fraction that remains a random part of the rows. The entries of all sources
stand one after another, are cut into runs of neighbours, and the runs are drawn in a random order: reading
stays nearly sequential, and what a share of the runs holds is a mixture of the sources.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from torchtitan_rd.data.arrow import cells_of, check_columns
from torchtitan_rd.data.chat import check_conversations, read_conversation
from torchtitan_rd.data.chat_template import Message
from torchtitan_rd.data.cursor import permuted
from torchtitan_rd.data.files import FileList
from torchtitan_rd.data.row_files import naming_the_file
from torchtitan_rd.data.text import TextEncoder
from torchtitan_rd.data.tokenizer import ByteTokenizer
from torchtitan_rd.errors import ConfigError, DataError

RUN = 64  # documents that are read together

_MOST_COPIES = 1 << 20  # of one document, more than anybody means

Document = str | list[Message]


@dataclass(frozen=True)
class Entry:
    """One document: the number of its source, its row there, and which copy of the row it is."""

    source: int
    row: int
    copy: int


@dataclass(frozen=True)
class Source:
    """name: for messages and counts. table: a `datasets.Dataset`, of which `column` holds the texts.
    chat_columns: where the rows are conversations, the columns of these in place of `column` (data/chat.py).
    found: the files that hold the rows, for messages.
    """

    name: str
    table: Any
    column: str = "text"
    weight: float = 1.0
    chat_columns: tuple[str, ...] = ()
    found: FileList | None = None

    def __post_init__(self):
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"the weight of {self.name} is {self.weight}: expected 0 or more")
        if self.weight > _MOST_COPIES:
            raise ConfigError(
                f"the weight of {self.name} is {self.weight:g}: at most {_MOST_COPIES} is possible"
            )
        check_columns(self.table.column_names, self.columns, self.name, "--column")
        if self.chat_columns:
            check_conversations(cells_of(self.table.data.table, self.columns), self.columns, self.name)
            return
        TextEncoder(ByteTokenizer(), 258, self.column).check_type(
            self.table.data.column(self.column), self.name
        )

    def __len__(self) -> int:
        return len(self.table)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.chat_columns or (self.column,)

    @property
    def copies(self) -> int:
        """How often every row occurs."""
        return math.floor(self.weight)

    @property
    def sampled(self) -> int:
        """How many rows occur once more."""
        return round((self.weight - self.copies) * len(self))

    @cached_property
    def cells(self) -> Any:
        """The table as arrow, the columns alone."""
        return self.table.with_format("arrow", columns=list(self.columns))

    def read(self, rows: Sequence[int]) -> Sequence[Document]:
        """Raises DataError, naming the row and its file, for one that is no text or no conversation."""
        try:
            return self._read(rows)
        except DataError:
            for row in rows:
                with naming_the_file(self.found, row, len(self)):
                    self._read([row])
            raise

    def _read(self, rows: Sequence[int]) -> Sequence[Document]:
        # Neighbours are a slice, which is not copied.
        is_slice = list(rows) == list(range(rows[0], rows[-1] + 1))
        table = self.cells[rows[0] : rows[-1] + 1] if is_slice else self.cells[list(rows)]
        if not self.chat_columns:
            return self._texts(rows, table.column(self.column))
        cells = cells_of(table, self.columns)
        return [
            read_conversation(cells.slice(i, 1).combine_chunks(), self.columns, self.where(row))
            for i, row in enumerate(rows)
        ]

    def where(self, row: int) -> str:
        """What messages call a row."""
        return f"{self.name}: row {row}"

    def _texts(self, rows: Sequence[int], column: Any) -> list[str]:
        try:
            texts = column.to_pylist()
        except UnicodeDecodeError:
            texts = [self._one(column[i], row) for i, row in enumerate(rows)]
        for row, text in zip(rows, texts, strict=True):
            if text is None:
                raise DataError(f"{self.where(row)}: column {self.column!r} is null; expected text")
        return texts

    def _one(self, cell: Any, row: int) -> str:
        try:
            return cell.as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.where(row)}: column {self.column!r} is not UTF-8: {error}") from None


class Documents:
    """All entries of some sources. Raises DataError if there is none."""

    def __init__(self, sources: Sequence[Source], seed: int = 0, parts: int = 1):
        """parts: among how many the documents will be shared, which makes runs shorter where they are few."""
        self.sources = list(sources)
        self.seed = seed
        self._ends = np.cumsum([len(s) * s.copies + s.sampled for s in self.sources]).tolist()
        if not self._ends or not self._ends[-1]:
            weights = ", ".join(f"{s.name} (weight {s.weight:g}, {len(s)} rows)" for s in self.sources)
            raise DataError(f"no document is left: {weights}; all weights are 0, or the data is empty")
        self.run = max(1, min(RUN, len(self) // (parts * RUN)))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def runs(self) -> int:
        return -(-len(self) // self.run)

    def entries(self, position: int) -> list[Entry]:
        """Those of the run at `position` in the order of runs."""
        run = permuted(position, self.runs, self.seed, epoch=0)
        return [self._entry(i) for i in range(run * self.run, min((run + 1) * self.run, len(self)))]

    def read(self, entries: Sequence[Entry]) -> list[Document]:
        """Their texts and conversations, in this order."""
        documents: list[Document] = []
        start = 0
        for end in range(1, len(entries) + 1):
            if end == len(entries) or entries[end].source != entries[start].source:
                source = self.sources[entries[start].source]
                documents += source.read([entry.row for entry in entries[start:end]])
                start = end
        return documents

    def texts(self, max_characters: int | None = None) -> Iterator[str]:
        """All of them, in order, each cut off after so many characters; of a conversation what is said, an
        empty line between two messages.
        """
        for position in range(self.runs):
            for document in self.read(self.entries(position)):
                said = [document] if isinstance(document, str) else [one["content"] for one in document]
                yield "\n\n".join(said)[:max_characters]

    def _entry(self, index: int) -> Entry:
        source = int(np.searchsorted(self._ends, index, side="right"))
        index -= self._ends[source - 1] if source else 0
        rows, copies = len(self.sources[source]), self.sources[source].copies
        if index < copies * rows:
            return Entry(source, index % rows, index // rows)
        return Entry(source, permuted(index - copies * rows, rows, self.seed, epoch=source + 1), copies)
