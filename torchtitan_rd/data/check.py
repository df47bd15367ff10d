"""Reads every row of a data set, as a run would in time, and collects what would stop it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torchtitan_rd.data import get_dataset
from torchtitan_rd.data.arrow import SampleSource, TableSource, cells_of
from torchtitan_rd.data.chat import ChatEncoder
from torchtitan_rd.data.config import DatasetKeys
from torchtitan_rd.data.cursor import is_in
from torchtitan_rd.data.row_files import naming_the_file
from torchtitan_rd.data.sources import build_encoder, open_source
from torchtitan_rd.data.tokenizer import Tokenizer
from torchtitan_rd.data.windows import has_label
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger

_UNITS = {"spikes": "spike counts", "text": "characters", "packed": "ids", "chat": "ids"}
_ROWS_AT_ONCE = 256
_REPORT_SECONDS = 30.0
_MADE_ON_DEMAND = 1000  # samples that are computed without end: a few stand for all


@dataclass
class Report:
    """rows: in all; size: counts, characters or ids (`unit`) of the good ones;
    unlearned: conversations, each a row of its own, of which no label is left once they are cut off;
    problems: row number -> the error.
    """

    rows: int
    unit: str
    size: int = 0
    empty: int = 0
    skipped: int = 0
    unlearned: int = 0
    problems: dict[int, str] = field(default_factory=dict)
    ranges: list[list[int]] = field(default_factory=list)

    @property
    def skip_ranges(self) -> list[list[int]]:
        """training.skip_ranges as it is, and every row with a problem."""
        merged: list[list[int]] = []
        for first, last in sorted([*self.ranges, *([row, row] for row in self.problems)]):
            if merged and first <= merged[-1][1] + 1:
                merged[-1][1] = max(merged[-1][1], last)
            else:
                merged.append([first, last])
        return merged


def scan(keys: DatasetKeys, *, tokenizer: Tokenizer | None, vocab_size: int, seed: int, split: str) -> Report:
    """Checks every row that training.skip_ranges does not skip: its type, its counts or ids,
    whether it is empty.

    Text is not tokenised: a tokenizer that fits the vocabulary makes no id that does not. Conversations are
    written by their template, and tokenised.
    Raises ConfigError or DataError for what no row can be read without.
    """
    row = get_dataset(keys, split=split)
    if keys.stream:
        raise ConfigError("a stream has no row numbers: check it with --training.stream=false")
    encoder = build_encoder(keys, row.kind, tokenizer, vocab_size)
    source, found = open_source(keys, row, encoder, seed, split)
    report = Report(count_of(source), _UNITS[row.kind], ranges=keys.skip_ranges)
    found.log(keys.dataset, f"{len(source)} rows")

    reported = time.monotonic()
    for index, read in each_row(source):
        if is_in(keys.skip_ranges, index):
            report.skipped += 1
            continue
        try:
            with naming_the_file(found, index, len(source)):
                value, where = read(), source.where(index)
                size = encoder.check(value, where)
                report.size += size
                report.empty += size == 0
                if isinstance(encoder, ChatEncoder) and encoder.row_length is not None:
                    report.unlearned += not has_label(encoder.encode(value, where))
        except DataError as error:
            report.problems[index] = str(error)

        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            logger.info(
                "data: checked %d of %d rows, %d would stop a run", index, report.rows, len(report.problems)
            )
    return report


def count_of(source: TableSource | SampleSource) -> int:
    """The number of rows to look at."""
    return len(source) if isinstance(source, TableSource) else min(len(source), _MADE_ON_DEMAND)


def each_row(source: TableSource | SampleSource) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The number of each row, and what reads its value.
    Rows of a table are taken many at a time, without a copy.
    """
    if isinstance(source, SampleSource):
        yield from ((index, partial(source.samples.__getitem__, index)) for index in range(count_of(source)))
        return
    encoder, index = source.encoder, 0
    for begin in range(0, len(source), _ROWS_AT_ONCE):
        for chunk in cells_of(source.table[begin : begin + _ROWS_AT_ONCE], encoder.columns).chunks:
            for offset in range(len(chunk)):
                yield index, partial(encoder.read, chunk.slice(offset, 1), source.where(index))
                index += 1
