"""Whether a column of JSON files holds in every row what it should, told before the files are converted.

The datasets library (5.x) stores rows of mixed types as JSON, texts in quotes and with escapes, and from its
second block of 10 MB on casts that to the type of the first block: to a text like any other. Nothing shows in
the table that comes of it, so the files themselves are looked at.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

JsonKind = Literal["text", "messages"]
"""Text; or a list of objects with the texts `role` and `content`. Null is neither and allowed in place of
all of these: whoever reads the row says more about it.
"""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 8 << 20


def check_json(files: list[Path], column: str, kind: JsonKind) -> None:
    """Raises DataError, naming file and row, where `column` holds anything but `kind` or null.

    Files that are no JSON are left to the reader, which says more about them.
    """
    for file in files:
        with opened(file) as stream:
            begin = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        try:
            if begin.startswith(b"["):
                _check_array(file, column, kind)
            elif begin:
                _check_lines(file, column, kind)
        except UnicodeDecodeError:
            continue


def rows_of_json(file: Path) -> int:
    """The rows of a file of JSON lines, which is read in blocks, or of one list, which is read whole."""
    with opened(file) as stream:
        block = stream.read(_BLOCK).removeprefix(b"\xef\xbb\xbf")
        if block.lstrip().startswith(b"["):
            return len(json.loads(block + stream.read()))

        rows, has_content = 0, False  # of the line that is not yet at its end
        while block:
            line, *others = block.split(b"\n")
            has_content |= bool(line.strip())
            for line in others:
                rows += has_content
                has_content = bool(line.strip())
            block = stream.read(_BLOCK)
    return rows + has_content


def opened(file: Path) -> "pa.NativeFile":
    """Decompressed, whatever the case of its suffix."""
    import pyarrow as pa

    return pa.input_stream(str(file), compression=COMPRESSIONS.get(file.suffix.lower()))


def _check_lines(file: Path, column: str, kind: JsonKind) -> None:
    import pyarrow as pa
    import pyarrow.json

    message = pa.struct({"role": pa.string(), "content": pa.string()})
    expected = pa.string() if kind == "text" else pa.list_(message)
    rows = 0
    with opened(file) as stream:
        try:
            reader = pyarrow.json.open_json(
                stream,
                read_options=pyarrow.json.ReadOptions(block_size=_BLOCK),
                parse_options=pyarrow.json.ParseOptions(
                    explicit_schema=pa.schema({column: expected}), unexpected_field_behavior="ignore"
                ),
            )
            for batch in reader:
                rows += len(batch)
        except pa.ArrowInvalid as error:
            if f"Column(/{column}" in str(error):
                _name_first(file, column, kind, rows)


def _name_first(file: Path, column: str, kind: JsonKind, after: int) -> None:
    """Raises for the first row after so many that are good."""
    with opened(file) as stream:
        lines = (line for line in stream.read().splitlines() if line.strip())
        for row, line in enumerate(lines):
            if row >= after:
                _check(json.loads(line).get(column), f"{file}: row {row}", column, kind)


def _check_array(file: Path, column: str, kind: JsonKind) -> None:
    """One JSON list: of objects, or of the values themselves."""
    with opened(file) as stream:
        content = stream.read()
    try:
        values = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        return
    for row, value in enumerate(values):
        cell = value.get(column) if isinstance(value, dict) else value
        _check(cell, f"{file}: row {row}", column, kind)


def _check(value: Any, where: str, column: str, kind: JsonKind) -> None:
    if kind == "messages" and isinstance(value, list):
        for number, message in enumerate(value):
            _check_message(message, f"{where}, message {number}")
    elif value is not None and not (kind == "text" and isinstance(value, str)):
        expected = "text in every row" if kind == "text" else "a list of messages in every row"
        raise DataError(f"{where}: column {column!r} holds {_shown(value)}; expected {expected}")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{where}: is {_shown(message)}; expected an object with role and content")
    for field in ("role", "content"):
        if not isinstance(message.get(field), str | None):
            raise DataError(f"{where}: has the {field} {_shown(message[field])}; expected text")


def _shown(value: Any) -> str:
    return f"{json.dumps(value, separators=(',', ':')):.40}"
