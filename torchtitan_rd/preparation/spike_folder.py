"""`data prepare-spikes`: recordings -> a folder of parquet that `training.dataset_path` names.

First the rows of each session go into a file of its own in `.work`, in order, and then all of them, shuffled,
into the files of the result: no more than a session, or the rows that are written together, is in memory.
Each file has its name when it is complete, so a run that follows one that was killed goes on behind it.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchtitan_rd.data.arrow import SOURCE_COLUMN
from torchtitan_rd.errors import TorchtitanRDError
from torchtitan_rd.preparation.manifest import MANIFEST, Output, Recipe, describe, progress_bar
from torchtitan_rd.preparation.recordings import (
    COUNTS,
    RecordingFiles,
    find_recordings,
    read_recording,
)
from torchtitan_rd.preparation.spikes import Facts, Row, Settings, facts_of, rows_of, shuffled, split

STEP, PARTS = "prepare-spikes", "parts"
SCHEMA = pa.schema(
    {
        COUNTS: pa.list_(pa.list_(pa.uint8())),  # neurons of time bins, as in the Neural Pile
        SOURCE_COLUMN: pa.string(),
        "session": pa.string(),
        "first_bin": pa.int64(),
    }
)
_TOKENS_PER_FILE = 500_000_000
_TOKENS_PER_GROUP, _ROWS_PER_GROUP = 5_000_000, 1000  # what is in memory of a file, and what a reader reads


@dataclass(frozen=True)
class _Place:
    """Where a row lies until it is shuffled. name: source, session, first bin. group: of the part's file."""

    name: tuple[str, str, int]
    part: Path
    group: int
    tokens: int


def prepare(inputs: Sequence[str], folder: Path, settings: Settings) -> dict[str, Any]:
    """Makes `folder`, or goes on where a process was ended; returns its manifest.

    Nothing is done where it is complete. The same inputs and settings give the same bytes.
    Raises ConfigError, and DataError for what is wrong with an input, or with what lies at `folder`.
    """
    recordings = find_recordings(inputs)
    output = Output.open(folder, _recipe(recordings, settings))
    with output.making("spikes") as done:
        if done:
            return done
        parts = _write_parts(output, recordings, settings)
        splits, files = _write_splits(output, parts, settings)
        facts = [_read_json(part.with_suffix(".json")) for part in parts]
        return output.finish({"sessions": facts, "splits": splits, "files": files})


def _recipe(recordings: Sequence[RecordingFiles], settings: Settings) -> Recipe:
    """All that the rows depend on."""
    contents: dict[str, dict[str, Any]] = {}
    for recording in recordings:
        name = f"{recording.source}/{recording.session}"
        several = len(recording.files) > 1
        contents |= {f"{name}/{file.name}" if several else name: describe(file) for file in recording.files}
    arguments = {name.replace("_", "-"): value for name, value in vars(settings).items()}
    return Recipe(STEP, arguments, contents, libraries={"pyarrow": pa.__version__})


def _write_parts(output: Output, recordings: list[RecordingFiles], settings: Settings) -> list[Path]:
    """One file of rows for each session, and one that says what became of it, which comes last."""
    parts = [output.work / PARTS / f"{number:05d}.parquet" for number in range(len(recordings))]
    missing = [
        (part, recording)
        for part, recording in zip(parts, recordings, strict=True)
        if not part.with_suffix(".json").exists()
    ]
    try:
        with progress_bar(len(parts), len(parts) - len(missing), " sessions", "reading") as bar:
            for part, recording in missing:
                _write_part(output, part, recording, settings)
                bar.update()
    except TorchtitanRDError:
        # What is wrong with the first session need not be removed by hand when it is mended.
        if not any(part.with_suffix(".json").exists() for part in parts):
            shutil.rmtree(output.work)
            (output.folder / MANIFEST).unlink()
            with suppress(OSError):  # it stays where it is a link
                output.folder.rmdir()
        raise
    return parts


def _write_part(output: Output, path: Path, recording: RecordingFiles, settings: Settings) -> None:
    """Each row is a row group, so that any can be read alone."""
    found = read_recording(recording, settings.unit, settings.where, settings.intervals)
    facts = facts_of(found, recording.source, recording.session)
    fresh = output.stage(path)
    with pq.ParquetWriter(fresh, SCHEMA, compression="zstd") as writer:
        for row in rows_of(found, facts, settings, recording.name):
            writer.write_table(_table(row, recording.source))
    output.commit(fresh, path)
    output.write(path.with_suffix(".json"), json.dumps(asdict(facts)))


def _table(row: Row, source: str) -> pa.Table:
    neurons, bins = row.counts.shape
    values = pa.array(np.ascontiguousarray(row.counts).reshape(-1))
    trains = pa.ListArray.from_arrays(pa.array(np.arange(neurons + 1, dtype=np.int32) * bins), values)
    counts = pa.ListArray.from_arrays(pa.array([0, neurons], pa.int32()), trains)
    return pa.table([counts, [source], [row.session], [row.first_bin]], schema=SCHEMA)


def _write_splits(
    output: Output, parts: list[Path], settings: Settings
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, Any]]]:
    """Every row of every part, shuffled, in files of one split each.

    -> split -> its rows and tokens; file -> its rows, size and sha256.
    """
    rows = [row for part in parts for row in _rows_of_part(part)]
    train, test = split(shuffled([row.name for row in rows], settings.seed), settings.test_share)

    splits, files = {}, {}
    with progress_bar(len(rows), 0, " rows", "shuffling") as bar:
        for name, numbers in (("train", train), ("test", test)):
            chosen = [rows[number] for number in numbers]
            splits[name] = {"rows": len(chosen), "tokens": sum(row.tokens for row in chosen)}
            for index, share in enumerate(_shares(chosen, _TOKENS_PER_FILE)):
                path = output.folder / f"{name}-{index:05d}.parquet"
                if not path.exists():
                    fresh = output.stage(path)
                    _write_file(fresh, share)
                    output.commit(fresh, path)
                files[path.name] = {"rows": len(share), **describe(path)}
                bar.update(len(share))
    return splits, files


def _rows_of_part(part: Path) -> list[_Place]:
    facts = Facts(**_read_json(part.with_suffix(".json")))
    with pq.ParquetFile(part) as file:
        rows = file.read(columns=["session", "first_bin"]).to_pylist()
        # Column 0 of the file holds the counts themselves.
        sizes = [file.metadata.row_group(group).column(0).num_values for group in range(len(rows))]
    return [
        _Place(
            (facts.source, row["session"], row["first_bin"]),
            part,
            group,
            (facts.units + 1) * size // facts.units,
        )
        for group, (row, size) in enumerate(zip(rows, sizes, strict=True))
    ]


def _shares(rows: list[_Place], tokens: int, most: int | None = None) -> Iterator[list[_Place]]:
    """The rows, in order, in shares that end with the row that brings them to so many tokens,
    or to the number of rows `most`.
    """
    share: list[_Place] = []
    size = 0
    for row in rows:
        share.append(row)
        size += row.tokens
        if size >= tokens or len(share) == most:
            yield share
            share, size = [], 0
    if share:
        yield share


def _write_file(path: Path, rows: list[_Place]) -> None:
    # A part with many short rows has a long index, which is not read again for each of them.
    opened = lru_cache(maxsize=32)(pq.ParquetFile)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for share in _shares(rows, _TOKENS_PER_GROUP, _ROWS_PER_GROUP):
            tables = [opened(row.part).read_row_group(row.group) for row in share]
            writer.write_table(pa.concat_tables(tables).combine_chunks())


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
