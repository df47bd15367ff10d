"""Reads rows from files of which some may be bad: each row is its columns, or the reason why it is none."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_rd.data.arrow import check_columns
from torchtitan_rd.data.chat import decoded
from torchtitan_rd.data.files import BUILDERS
from torchtitan_rd.data.json_text import COMPRESSIONS, opened
from torchtitan_rd.errors import DataError

FEATURES = "`features`"  # the key of a sources file that names columns
_BATCH = 1024


@dataclass(frozen=True)
class RawRow:
    """value: of the columns, None where `bad` says what is wrong. size: bytes of the file that it took,
    about; 0 where that is not known.
    """

    value: Sequence[Any] | None
    bad: str | None = None
    size: float = 0.0


def read_raw(file: Path, columns: Sequence[str], start: int = 0) -> Iterator[RawRow]:
    """The rows of a .txt, .jsonl, .json, .parquet or .arrow file from number `start` on.

    Raises DataError, naming the file, where none of its rows can be read: no such column, no such format.
    """
    compressed = file.suffix.lower() in COMPRESSIONS
    kind = BUILDERS[(Path(file.stem) if compressed else file).suffix.lower()]
    try:
        if kind == "text":
            yield from list(_document(file))[start:]
        elif kind == "json":
            yield from _json_rows(file, columns, start, compressed)
        else:
            yield from _arrow_rows(file, columns, start, kind)
    except OSError as error:  # of the disk, or of a compressed file that is damaged
        raise DataError(f"{file}: cannot be read: {error}") from None


def _document(file: Path) -> Iterator[RawRow]:
    with opened(file) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield RawRow(None, "not UTF-8", file.stat().st_size)
        return
    # As `open` reads text, and so training and `tokenize` do.
    yield RawRow([text.replace("\r\n", "\n").replace("\r", "\n")], size=file.stat().st_size)


def _json_rows(file: Path, columns: Sequence[str], start: int, compressed: bool) -> Iterator[RawRow]:
    with opened(file) as stream:
        if stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            rows = _json_array(file)
            size = file.stat().st_size / max(1, len(rows))
            yield from (_fields(row, columns, size) for row in rows[start:])
            return
    number = 0
    with opened(file) as stream:
        for line in _lines(stream):
            if not line.strip():
                continue
            if number >= start:
                yield _parsed(line, columns, 0.0 if compressed else len(line))
            number += 1


def _lines(stream: Any) -> Iterator[bytes]:
    """A line of JSON holds no other line end than its last byte."""
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _json_array(file: Path) -> list[Any]:
    with opened(file) as stream:
        try:
            return json.loads(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: is no JSON list: {error}") from None


def _parsed(line: bytes, columns: Sequence[str], size: float) -> RawRow:
    try:
        return _fields(json.loads(line.decode("utf-8-sig")), columns, size)
    except UnicodeDecodeError:
        return RawRow(None, "not UTF-8", size)
    except (ValueError, RecursionError):  # of lists that are nested thousands deep
        return RawRow(None, "not JSON", size)


def _fields(row: Any, columns: Sequence[str], size: float) -> RawRow:
    if not isinstance(row, dict):
        return RawRow(None, "not a JSON object", size)
    for column in columns:
        if column not in row:
            return RawRow(None, f"no column {column!r}", size)
    return RawRow([row[column] for column in columns], size=size)


def _arrow_rows(file: Path, columns: Sequence[str], start: int, kind: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            reader = pq.ParquetFile(file)
            names, total = reader.schema_arrow.names, reader.metadata.num_rows
            check_columns(names, columns, file, FEATURES)
            batches = reader.iter_batches(_BATCH, columns=list(columns))
        else:
            table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
            names, total = table.column_names, len(table)
            check_columns(names, columns, file, FEATURES)
            batches = iter(table.select(list(columns)).to_batches(_BATCH))
        yield from _from_batches(batches, columns, start, file.stat().st_size / max(1, total))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: is no readable {kind} file: {error}") from None


def _from_batches(
    batches: Iterator[Any], columns: Sequence[str], start: int, size: float
) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        skipped = min(max(0, start - number), len(batch))
        number += len(batch)
        for row in range(skipped, len(batch)):
            yield row_at(batch, row, columns, size)


def row_at(batch: Any, row: int, columns: Sequence[str], size: float) -> RawRow:
    """A row of an arrow table or batch."""
    cells = [batch.column(name)[row] for name in columns]
    try:
        return RawRow([decoded(cell.as_py(), cell.type) for cell in cells], size=size)
    except UnicodeDecodeError:
        return RawRow(None, "not UTF-8", size)


# Half of a pair of UTF-16, which JSON can hold and UTF-8 cannot.
SURROGATE = re.compile("[\ud800-\udfff]")


def as_text(row: RawRow, columns: Sequence[str]) -> tuple[str, str | None]:
    """The columns of a row as one text, an empty line between them; or "" and why that cannot be."""
    if row.value is None:
        return "", row.bad
    for column, value in zip(columns, row.value, strict=True):
        if not isinstance(value, str):
            return "", f"column {column!r} is {'null' if value is None else 'no text'}"
    text = "\n\n".join(row.value)
    if not text.strip():
        return "", "empty"
    return (text, None) if not SURROGATE.search(text) else ("", "not UTF-8")
