"""Whether a column of JSON files holds text in every row, told before the files are converted.

The datasets library (5.x) stores rows of mixed types as JSON, texts in quotes and with escapes, and from its
second block of 10 MB on casts that to the type of the first block: to a text like any other. Nothing shows in
the table that comes of it, so the files themselves are looked at.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK = 8 << 20


def check_json_text(files: list[Path], column: str) -> None:
    """Raises DataError, naming file and row, where `column` holds anything but text or null.

    Files that are no JSON are left to the reader, which says more about them.
    """
    for file in files:
        with _opened(file) as stream:
            begin = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        try:
            if begin.startswith(b"["):
                _check_array(file, column)
            elif begin:
                _check_lines(file, column)
        except UnicodeDecodeError:
            continue


def _opened(file: Path) -> "pa.NativeFile":
    """Decompressed, whatever the case of its suffix."""
    import pyarrow as pa

    return pa.input_stream(str(file), compression={".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower()))


def _check_lines(file: Path, column: str) -> None:
    import pyarrow as pa
    import pyarrow.json

    rows = 0
    with _opened(file) as stream:
        try:
            reader = pyarrow.json.open_json(
                stream,
                read_options=pyarrow.json.ReadOptions(block_size=_BLOCK),
                parse_options=pyarrow.json.ParseOptions(
                    explicit_schema=pa.schema({column: pa.string()}), unexpected_field_behavior="ignore"
                ),
            )
            for batch in reader:
                rows += len(batch)
        except pa.ArrowInvalid as error:
            if f"Column(/{column}) changed from string" in str(error):
                _name_first(file, column, rows)


def _name_first(file: Path, column: str, after: int) -> None:
    """Raises for the first row after so many that are good."""
    with _opened(file) as stream:
        lines = (line for line in stream.read().splitlines() if line.strip())
        for row, line in enumerate(lines):
            if row >= after:
                _check(json.loads(line).get(column), file, row, column)


def _check_array(file: Path, column: str) -> None:
    """One JSON list: of objects, or of the texts themselves."""
    with _opened(file) as stream:
        content = stream.read()
    try:
        values = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        return
    for row, value in enumerate(values):
        _check(value.get(column) if isinstance(value, dict) else value, file, row, column)


def _check(value: Any, file: Path, row: int, column: str) -> None:
    if value is not None and not isinstance(value, str):
        shown = json.dumps(value, separators=(",", ":"))
        raise DataError(f"{file}: row {row}: column {column!r} holds {shown:.40}; expected text in every row")
