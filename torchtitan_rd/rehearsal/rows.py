"""Rows for a rehearsal: the first ones of the run's own data where they can be had here, each judged as
training would judge it; else rows that are made up in the schema of the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan_rd.conversion.tokenizer_files import tokenizer_files
from torchtitan_rd.data import Dataset, DatasetKeys, pydoc_topics
from torchtitan_rd.data.arrow import SOURCE_COLUMN, Encoder, cells_of, check_columns, encode_row
from torchtitan_rd.data.sources import Kind, open_rows
from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS, MOST_BYTES = 32, 32 << 20
"""Rows that a rehearsal reads, and the size at which it has enough of them earlier."""

LOOKED_THROUGH = 20_000
"""Rows among which those of one `source_dataset` are looked for."""

FILES = 8
"""Files of a sample: as many as `training.lane_per_file` may want lanes of a small batch."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Wanted:
    """What is to be had of one data set. split: its name among the files of the sample.
    seq_len: of the rehearsal, to which packed rows are cut. vocab_size: of the run.
    """

    keys: DatasetKeys
    row: Dataset
    split: str
    seq_len: int
    vocab_size: int


def sample_rows(wanted: Wanted, encoder: Encoder, folder: Path, reaches_hub: bool) -> str | None:
    """Writes the first rows of the data to `folder`; returns None, or why they could not be had here.

    encoder: the run's own, which judges each row. reaches_hub: whether the hub answers; else its cache is
    looked at. Raises DataError for rows that would stop the run, and for files of the run's own that
    cannot be read.
    """
    keys, name = wanted.keys, wanted.keys.dataset
    on_hub = not (keys.dataset_path and Path(keys.dataset_path).exists())
    # Of files here, and of the hub, the first rows come at once as a stream; a cache holds no stream.
    opened = keys.model_copy(update={"stream": not on_hub or reaches_hub, "source_dataset": None})
    try:
        table, _ = open_rows(opened, wanted.row, encoder, wanted.split)
        rows = _first_rows(table.with_format("arrow"), keys.source_dataset)
        found = list(rows)
    except DataError as error:
        if keys.dataset_path:
            raise
        return _first_line(str(error))
    except Exception as error:  # of the hub and the network while rows are fetched: a library boundary
        if not on_hub:
            raise DataError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error
        return f"{type(error).__name__}: {_first_line(str(error))}"

    if not found:
        of = f" of training.source_dataset = {keys.source_dataset!r}" if keys.source_dataset else ""
        raise DataError(f"{name}: none of the first {LOOKED_THROUGH:,} rows{of}: is the data empty?")
    for number, one in enumerate(found):
        check_columns(one.column_names, encoder.columns, name)
        if number == 0:
            encoder.check_type(cells_of(one, encoder.columns), name)
        encode_row(one, encoder, f"{name}: row {number} of split {wanted.split}")
    _write([one.select(list(encoder.columns)) for one in found], wanted, folder)
    return None


def make_up_rows(wanted: Wanted, folder: Path) -> None:
    """Writes rows of the kind of the data to `folder`, in the columns that the run reads; those of a held-out
    split are others than those of training, which would be refused.
    """
    import pyarrow as pa

    first = 0 if wanted.split == "train" else ROWS
    columns = made_up(wanted.row.kind, wanted.keys, wanted.seq_len, wanted.vocab_size, first)
    table = pa.table(columns)
    _write([table.slice(number, 1) for number in range(len(table))], wanted, folder)


def made_up(kind: Kind, keys: DatasetKeys, seq_len: int, vocab_size: int, first: int = 0) -> dict[str, Any]:
    """Column -> ROWS cells from number `first` on, the same at every call.

    spikes: counts (N, T) of 5 to 20 neurons with a mean of 0.3. packed: seq_len + 1 ids, eos_id among them.
    text: Python's help topics. chat: sums and their results.
    """
    import pyarrow as pa

    numbers = np.random.default_rng(first)
    if kind == "spikes":
        shapes = [(int(numbers.integers(5, 21)), 100) for _ in range(ROWS)]
        counts = [np.minimum(numbers.poisson(0.3, shape), vocab_size - 2).tolist() for shape in shapes]
        return {keys.column or "spike_counts": pa.array(counts, pa.list_(pa.list_(pa.int64())))}
    if kind == "packed":
        ids = numbers.integers(0, vocab_size, (ROWS, seq_len + 1))
        if keys.eos_id is not None:
            ids[:, seq_len // 2] = keys.eos_id
        return {keys.column or "input_ids": ids.tolist()}
    if kind == "text":
        return {keys.column or "text": list(islice(pydoc_topics(0), first, first + ROWS))}

    questions = [f"{n} + {n}?" for n in range(first, first + ROWS)]
    answers = [f"It is {2 * n}." for n in range(first, first + ROWS)]
    if keys.question_column and keys.answer_column:
        return {keys.question_column: questions, keys.answer_column: answers}
    roles = ("user", "assistant")
    turns = [
        [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]
        for pair in zip(questions, answers, strict=True)
    ]
    return {keys.column or "messages": turns}


def make_up_chat_tokenizer(folder: Path) -> None:
    """Writes the byte tokenizer with a chat template to `folder`."""
    folder.mkdir(parents=True)
    for name, content in tokenizer_files("bytes").files.items():
        (folder / name).write_bytes(content)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _first_rows(table: Any, source: str | None) -> "Iterator[pa.Table]":
    """Tables of one row: ROWS of them or MOST_BYTES, of `source` alone if it is given."""
    taken = size = 0
    for one in islice(table, LOOKED_THROUGH):
        if source is not None:
            check_columns(one.column_names, [SOURCE_COLUMN], "training.source_dataset")
            if one.column(SOURCE_COLUMN)[0].as_py() != source:
                continue
        yield one
        taken, size = taken + 1, size + one.nbytes
        if taken == ROWS or size > MOST_BYTES:
            return


def _write(rows: "list[pa.Table]", wanted: Wanted, folder: Path) -> None:
    """FILES files named after the split, each with ROWS / FILES rows; few rows are repeated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if wanted.row.kind == "packed":
        rows = [_cut(one, wanted.seq_len + 1) for one in rows]
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.concat_tables(rows[number % len(rows)] for number in range(ROWS))
    share = ROWS // FILES
    for number in range(FILES):
        part = table.slice(number * share, share)
        pq.write_table(part, folder / f"{wanted.split}-{number}.parquet")


def _cut(row: "pa.Table", length: int) -> "pa.Table":
    import pyarrow as pa

    ids = row.column(0)
    return pa.table({row.column_names[0]: pa.array([ids[0].as_py()[:length]], ids.type)})


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
