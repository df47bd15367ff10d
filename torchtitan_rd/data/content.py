"""What tells data apart: digests of rows and files, and what changed between two of them.

Up to `WHOLE_BYTES` every byte counts. Beyond it the length of every row (and of every list within) counts,
and of the values the first of every so many pages, `SAMPLE_BYTES` in all, spread evenly.
"""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan_rd.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

WHOLE_BYTES = 8 << 30
SAMPLE_BYTES = 1 << 30
_PAGE = 1 << 16
_BLOCKS = 64
_MANY = 1 << 20  # samples that are made on demand, of which a few tell them apart


class Digest:
    """A digest of a sequence of bytes that arrives in parts of any size: of its pages 0,
    stride, 2 * stride, ...
    """

    def __init__(self, stride: int = 1):
        import xxhash

        self._hash = xxhash.xxh3_128()
        self._stride = stride
        self._position = 0

    def update(self, data: Any) -> None:
        """data: bytes, or anything with a buffer."""
        view = memoryview(data).cast("B")
        if self._stride == 1:
            self._hash.update(view)
            return
        step = self._stride * _PAGE
        first = self._position // step * step - self._position  # may lie before this part
        for start in range(first, len(view), step):
            self._hash.update(view[max(start, 0) : max(start + _PAGE, 0)])
        self._position += len(view)

    def digest(self) -> bytes:
        return self._hash.digest()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:16]


def stride_of(size: int) -> int:
    """How many pages there are to each that is read."""
    return 1 if size <= WHOLE_BYTES else -(-size // SAMPLE_BYTES)


def digest_of(*parts: Any) -> str:
    """A short digest of a few plain values."""
    digest = Digest()
    digest.update(repr(parts).encode())
    return digest.hexdigest()


def digest_of_file(path: Path, stride: int = 1) -> str:
    digest = Digest(stride)
    if path.stat().st_size:
        with path.open("rb") as file:
            digest.update(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return digest.hexdigest()


def digest_of_table(table: "datasets.Dataset", *columns: str) -> dict[str, Any]:
    """Of these columns: their type, and a digest of each of up to 64 equal ranges of rows,
    whatever chunks they lie in.
    """
    cells = table.with_format("arrow", columns=list(columns))
    stride = stride_of(sum(table.data.column(column).nbytes for column in columns))
    digests = []
    for begin, end in _blocks(len(table)):
        streams: dict[str, Digest] = {}
        rows = cells[begin:end]
        for number, column in enumerate(columns):
            for chunk in rows.column(column).chunks:
                _update(streams, f"{number}." if number else "", chunk, stride)
        digests.append(digest_of(*((level, stream.digest()) for level, stream in sorted(streams.items()))))
    types = ", ".join(str(table.data.schema.field(column).type) for column in columns)
    return {"type": types, "whole": stride == 1, "digests": digests}


def digest_of_samples(samples: Sequence[Any]) -> dict[str, Any]:
    """The same of samples that are made here: all of them, or the first of those that are made on demand."""
    made = len(samples) if len(samples) < _MANY else 4
    digests = []
    for begin, end in _blocks(made):
        digest = Digest()
        for sample in (samples[i] for i in range(begin, end)):
            data = sample.encode() if isinstance(sample, str) else np.ascontiguousarray(sample)
            digest.update(repr((len(data), getattr(data, "shape", None))).encode())
            digest.update(data)
        digests.append(digest.hexdigest())
    return {"type": "made here", "whole": made == len(samples), "digests": digests}


def changed_rows(saved: dict[str, Any], present: dict[str, Any], rows: int) -> str | None:
    """Which rows differ between two digests of as many rows, in words; None if none does."""
    if saved["type"] != present["type"]:
        return f"the column was {saved['type']} and is now {present['type']}"
    blocks = _blocks(rows if present["type"] != "made here" else min(rows, 4 if rows >= _MANY else rows))
    ranges: list[list[int]] = []
    for (begin, end), before, now in zip(blocks, saved["digests"], present["digests"], strict=True):
        if before == now:
            continue
        if ranges and ranges[-1][1] == begin - 1:
            ranges[-1][1] = end - 1
        else:
            ranges.append([begin, end - 1])
    if not ranges:
        return None
    shown = ", ".join(f"{a}..{b}" if a < b else f"{a}" for a, b in ranges[:4])
    more = f" and {len(ranges) - 4} more ranges" if len(ranges) > 4 else ""
    return f"among rows {shown}{more} of {rows}, some hold other data or stand in another order"


def changed_files(saved: dict[str, Any], present: dict[str, Any]) -> list[str]:
    """Files that are gone, new or different, in words."""
    lines = []
    for name in sorted({*saved, *present}):
        before, now = saved.get(name), present.get(name)
        if before is None or now is None:
            lines.append(f"{name} is {'new' if before is None else 'gone'}")
        elif before["size"] != now["size"]:
            lines.append(f"{name} had {before['size']:,} bytes and has {now['size']:,}")
        elif before.get("digest") != now.get("digest"):
            lines.append(f"{name} has other content")
        elif before != now:
            lines.append(f"{name} was written since")
    return lines


def _blocks(rows: int) -> list[tuple[int, int]]:
    count = min(rows, _BLOCKS)
    return [(rows * k // count, rows * (k + 1) // count) for k in range(count)]


def _update(streams: dict[str, Digest], level: str, array: "pa.Array", stride: int) -> None:
    """Adds an arrow array: lengths and values go to streams of their own, so that no chunk border shows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def add(name: str, data: Any, stride: int = 1) -> None:
        streams.setdefault(level + name, Digest(stride)).update(data)

    array, kind = getattr(array, "storage", array), getattr(array.type, "storage_type", array.type)
    if pa.types.is_string_view(kind):
        array, kind = array.cast(pa.large_string()), pa.large_string()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        add("lengths", _lengths(pc.binary_length(array)))
        wide = np.int64 if pa.types.is_large_string(kind) else np.int32
        _, offsets, values = array.buffers()
        if len(array) and values is not None:
            bounds = np.frombuffer(offsets, wide)[array.offset : array.offset + len(array) + 1]
            add("values", memoryview(values)[bounds[0] : bounds[-1]], stride)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        add("lengths", _lengths(pc.list_value_length(array)))
        _update(streams, level + "items.", array.flatten(), stride)

    elif pa.types.is_struct(kind):
        add("nulls", array.is_null().to_numpy(zero_copy_only=False))
        for field, values in zip(kind, array.flatten(), strict=True):
            _update(streams, f"{level}{field.name}.", values, stride)
    elif pa.types.is_null(kind):
        add("nulls", bytes(len(array)))
    elif pa.types.is_primitive(kind):
        if array.null_count:
            add("nulls", array.is_null().to_numpy(zero_copy_only=False))
            array = array.fill_null(False if pa.types.is_boolean(kind) else 0)
        add("values", np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).view(np.uint8), stride)
    else:
        raise DataError(f"a column of {array.type} cannot be read")


def _lengths(lengths: "pa.Array") -> np.ndarray:
    import pyarrow as pa

    return lengths.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
