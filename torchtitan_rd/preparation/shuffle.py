"""The same packed rows in a random order, in memory that is bounded: held-out rows stay among themselves.

Every row gets a random key of 64 bits from its number, and the order is that of the keys. First rows are
dealt out to buckets by the first bits of their keys, then each bucket is sorted in memory and written on.
The result therefore depends on the seed alone, not on the memory that was allowed.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.preparation.manifest import (
    MANIFEST,
    Output,
    check_file,
    describe,
    progress_bar,
    read_finished,
    read_manifest,
)
from torchtitan_rd.preparation.rows import ROWS_TOGETHER, RowWriter, count_rows, digest_of_rows, read_rows
from torchtitan_rd.preparation.tokenize import SPLITS

_NOTED_SECONDS = 30.0  # between two notes of what is dealt out
_STEPS = ("tokenize", "shuffle")
# What a manifest says of rows whatever their order.
_KEPT = ("block_size", "vocab_size", "bos_id", "eos_id", "sources")
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Packed:
    """A folder of packed rows. contents: file name -> size and sha256. facts: of its manifest, if it has one.
    rows: split -> file name -> number of rows.
    """

    folder: Path
    contents: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    rows: dict[str, dict[str, int]]

    @classmethod
    def open(cls, folder: Path) -> "Packed":
        """Raises DataError if the folder, or a file of it, is not as `data tokenize` writes it."""
        facts: dict[str, Any] = {}
        if (folder / MANIFEST).is_file():
            step = read_manifest(folder)["step"]
            facts = read_finished(folder, step if step in _STEPS else "tokenize")
            contents = {
                name: {key: entry[key] for key in ("size", "sha256")}
                for name, entry in facts["files"].items()
            }
            for name, entry in contents.items():
                check_file(folder, name, entry)
        else:
            files = [file for split in SPLITS for file in sorted((folder / split).glob("*.parquet"))]
            contents = {str(file.relative_to(folder)): describe(file) for file in files}

        rows = {
            split: {
                name: count_rows(folder / name) for name in sorted(contents) if name.startswith(f"{split}/")
            }
            for split in SPLITS
        }
        if not sum(rows["train"].values()):
            raise DataError(f"{folder}: holds no rows in train/*.parquet")
        return cls(folder, contents, facts, rows)


@dataclass(frozen=True)
class Order:
    """files: split -> number of files. memory: bytes that a bucket may take."""

    seed: int
    files: dict[str, int]
    memory: int = 1 << 30

    @classmethod
    def of(cls, packed: Packed, seed: int, files: int | None, val_files: int | None, memory: int) -> "Order":
        """By default as many files as there are. Raises ConfigError for more than rows."""
        wanted = {"train": files, "val": val_files}
        rows_of = {split: sum(packed.rows[split].values()) for split in SPLITS}
        numbers = {}
        for split in SPLITS:
            rows, number = rows_of[split], wanted[split]
            numbers[split] = min(len(packed.rows[split]), rows) if number is None else number
            if number is not None and not 1 <= number <= rows:
                flag = "--files" if split == "train" else "--val-files"
                raise ConfigError(f"{flag} {number}: {packed.folder} has {rows} rows in {split}")
        if memory < 1:
            raise ConfigError(f"--memory {memory}: must be positive")
        return cls(seed, numbers, memory)


def shuffle(packed: Packed, order: Order, output: Output) -> dict[str, Any]:
    """Writes all splits. Returns the finished folder's manifest.

    Raises DataError for files that cannot be read, or where what was written is not what was read.
    """
    with output.making("shuffle") as done:
        if done:
            return done
        files: dict[str, Any] = {}
        digests = {}
        for split in SPLITS:
            if sum(packed.rows[split].values()):
                buckets = _Buckets(packed, order, output, split)
                buckets.deal()
                files |= buckets.write()
                digests[split] = f"{buckets.digest:016x}"
        rows = {split: sum(packed.rows[split].values()) for split in SPLITS}
        kept = {key: packed.facts[key] for key in _KEPT if key in packed.facts}
        return output.finish({"files": files, "rows": rows, "rows_digest": digests, **kept})


class _Buckets:
    """The rows of one split on their way."""

    def __init__(self, packed: Packed, order: Order, output: Output, split: str):
        self._packed, self._order = packed, order
        self._output, self._split = output, split
        self._inputs = list(packed.rows[split])
        self._total = sum(packed.rows[split].values())
        first = next(row for name in self._inputs for row in read_rows(packed.folder / name))
        self._width = first.shape[1]
        self._record = np.dtype([("key", "<u8"), ("ids", "<i4", (self._width,))])
        self._bits = max(0, -(-self._total * self._record.itemsize // order.memory) - 1).bit_length()

        fresh: dict[str, Any] = {
            "bits": self._bits,
            "inputs": 0,
            "rows": 0,
            "sizes": [0] * (1 << self._bits),
            "digest": 0,
            "files": {},
            "written_digest": 0,
        }
        noted = output.load(self._note_name)
        self._note = noted if noted and noted["bits"] == self._bits else fresh

    @property
    def digest(self) -> int:
        """Of all rows that were read, as a multiset."""
        return self._note["digest"]

    @property
    def _note_name(self) -> str:
        return f"shuffle-{self._split}.json"

    def deal(self) -> None:
        """Appends every row to the bucket of its key. Goes on behind the last input that is noted.

        A bucket is opened for many rows at a time: with thousands of buckets hardly two of a thousand rows
        go to the same one.
        """
        note, noted_at = self._note, time.monotonic()
        if note["inputs"] == len(self._inputs):
            return
        for bucket, size in enumerate(note["sizes"]):
            with self._path(bucket).open("ab") as file:
                file.truncate(size)  # rows of an input that was dealt out in part

        # Half of the memory, as the share of a bucket is copied out of it.
        held = max(self._order.memory // 2 // self._record.itemsize, ROWS_TOGETHER)
        self._held = np.empty(min(held, self._total), self._record)
        self._count = 0  # of its rows that are filled

        with progress_bar(self._total, note["rows"], "row", f"deal {self._split}") as bar:
            for number in range(note["inputs"], len(self._inputs)):
                for rows in read_rows(self._packed.folder / self._inputs[number]):
                    self._deal(rows, self._inputs[number])
                    bar.update(len(rows))
                note["inputs"] = number + 1
                if time.monotonic() - noted_at >= _NOTED_SECONDS or note["inputs"] == len(self._inputs):
                    self._keep()
                    noted_at = time.monotonic()
        del self._held

    def write(self) -> dict[str, Any]:
        """The files, of nearly equal numbers of rows. Goes on behind the last file that is noted."""
        note, number = self._note, self._order.files[self._split]
        borders = [self._total * i // number for i in range(number + 1)]
        done = len(note["files"])
        rows = self._sorted_rows(borders[done])
        rest = np.empty((0, self._width), np.int32)

        with progress_bar(self._total, borders[done], "row", f"write {self._split}") as bar:
            for index in range(done, number):
                name = f"{self._split}/000_{index:05d}.parquet"
                writer = RowWriter(self._output, self._output.folder / name)
                missing = borders[index + 1] - borders[index]
                while missing:
                    if not len(rest):
                        rest = next(rows)
                    part, rest = rest[:missing], rest[missing:]
                    writer.write(part)
                    missing -= len(part)
                    bar.update(len(part))
                note["files"][name] = writer.commit()
                note["written_digest"] = (note["written_digest"] + writer.digest) & _MASK
                self._output.save(self._note_name, note)

        if note["written_digest"] != note["digest"]:
            raise DataError(
                f"{self._output.folder}: the rows of {self._split} that were written are not those that were "
                "read: the disk is damaged, or another program wrote there; remove the folder and begin anew"
            )
        for bucket in range(1 << self._bits):
            self._path(bucket).unlink(missing_ok=True)
        return note["files"]

    def _deal(self, rows: np.ndarray, name: str) -> None:
        if rows.shape[1] != self._width:
            raise DataError(
                f"{self._packed.folder / name}: has rows of {rows.shape[1]} ids, but {self._inputs[0]} of "
                f"{self._width}; pack them anew"
            )
        note = self._note
        records = np.empty(len(rows), self._record)
        records["key"] = keys_of(note["rows"], len(rows), self._order.seed, self._split)
        records["ids"] = rows
        while len(records):
            part, records = np.split(records, [len(self._held) - self._count])
            self._held[self._count : self._count + len(part)] = part
            self._count += len(part)
            if self._count == len(self._held):
                self._flush()
        note["rows"] += len(rows)
        note["digest"] = (note["digest"] + digest_of_rows(rows)) & _MASK

    def _flush(self) -> None:
        """Appends the rows that are held to their buckets."""
        records, self._count = self._held[: self._count], 0
        owners = np.zeros(len(records), np.int64)
        if self._bits:  # a shift by all 64 is not defined
            owners = (records["key"] >> np.uint64(64 - self._bits)).astype(np.int64)
        borders = np.bincount(owners, minlength=1 << self._bits).cumsum()
        by_bucket = np.split(np.argsort(owners, kind="stable"), borders[:-1])

        for bucket, own in enumerate(by_bucket):
            if len(own):
                with self._path(bucket).open("ab") as file:
                    file.write(records[own].data)
                self._note["sizes"][bucket] += len(own) * self._record.itemsize

    def _keep(self) -> None:
        """Notes how far the dealing is, once the buckets are on storage."""
        self._flush()
        for bucket in range(1 << self._bits):
            with self._path(bucket).open("ab") as file:
                os.fsync(file.fileno())
        self._output.save(self._note_name, self._note)

    def _sorted_rows(self, first: int) -> Iterator[np.ndarray]:
        """All rows in their new order, from number `first` on, of one bucket in memory."""
        for bucket, size in enumerate(self._note["sizes"]):
            count = size // self._record.itemsize
            if count > first:
                records = np.fromfile(self._path(bucket), self._record)
                order = np.argsort(records["key"])[first:]
                for begin in range(0, len(order), ROWS_TOGETHER):
                    yield records["ids"][order[begin : begin + ROWS_TOGETHER]]
                del records  # before the next bucket is read
            first = max(0, first - count)

    def _path(self, bucket: int) -> Path:
        return self._output.work / f"bucket-{self._split}-{bucket}"


def keys_of(first: int, count: int, seed: int, split: str) -> np.ndarray:
    """The keys of rows first, first + 1, ...: (count,) uint64, no two alike within a split.

    splitmix64 (Steele, Lea and Flood, 2014): each of its steps can be undone, so distinct rows have distinct
    keys.
    """
    import xxhash

    base = np.uint64(xxhash.xxh3_64_intdigest(f"{split} {seed}".encode()))
    with np.errstate(over="ignore"):
        value = base + np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
