"""Recordings of neurons as files: which there are, and what each format holds."""

import csv
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.log import logger
from torchtitan_rd.preparation.npz import read_arrays
from torchtitan_rd.preparation.nwb import read_nwb
from torchtitan_rd.preparation.spike_times import (
    NANOSECONDS,
    SpikeCounts,
    SpikeTimes,
    nanoseconds,
    time_of,
)

SUFFIXES = (".nwb", ".npz", ".csv", ".txt")
COUNTS, TIMES = "spike_counts", "spike_times"  # arrays of an .npz file that are more than one unit


@dataclass(frozen=True)
class RecordingFiles:
    """One session. source: the data set that it is part of. files: one, or one .txt for each unit."""

    source: str
    session: str
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def find_recordings(inputs: Sequence[str]) -> list[RecordingFiles]:
    """The sessions of some paths, in the order of their names.

    An input is PATH or SOURCE=PATH; without a source, that is the name of the folder. A file is a session.
    Of a folder, searched through, each file is one too, but the .txt files of one folder are together one,
    with a unit in each. Raises ConfigError, DataError.
    """
    sessions: dict[tuple[str, str], RecordingFiles] = {}
    for text in inputs:
        source, path = _source_and_path(text)
        for found in _sessions_of(path, source):
            other = sessions.setdefault((found.source, found.session), found)
            if other is not found:
                raise ConfigError(
                    f"{found.name} and {other.name} are both session {found.session!r} of source "
                    f"{found.source!r}: name one of them OTHER_SOURCE=PATH"
                )
    return sorted(sessions.values(), key=lambda found: natural_order(f"{found.source}/{found.session}"))


def _source_and_path(text: str) -> tuple[str | None, Path]:
    source, separator, path = text.partition("=")
    if separator and source and path and not Path(text).exists():
        return source, Path(path)
    return None, Path(text)


def _sessions_of(path: Path, source: str | None) -> Iterable[RecordingFiles]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path}: not a recording; expected one of {', '.join(SUFFIXES)}")
        yield RecordingFiles(source or path.resolve().parent.name, path.stem, (path,))
        return
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder")

    source = source or path.resolve().name
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    known = sorted(
        (file for file in files if file.suffix.lower() in SUFFIXES), key=lambda file: natural_order(str(file))
    )
    if not known:
        raise DataError(f"{path}: a folder without recordings (looked for {', '.join(SUFFIXES)})")
    if len(known) < len(files):
        others = sorted(str(file) for file in set(files) - set(known))
        logger.info("%s: %d other files are left out, such as %s", path, len(others), others[0])

    trains: dict[Path, list[Path]] = {}
    for file in known:
        if file.suffix.lower() == ".txt":
            trains.setdefault(file.parent, []).append(file)
        else:
            yield RecordingFiles(source, file.relative_to(path).with_suffix("").as_posix(), (file,))
    for folder, of_folder in trains.items():
        name = path.resolve().name if folder == path else folder.relative_to(path).as_posix()
        yield RecordingFiles(source, name, tuple(of_folder))


def natural_order(name: str) -> list[str | int]:
    """A key to sort by: unit 2 before unit 10."""
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]


def read_recording(
    recording: RecordingFiles, unit: str, where: dict[str, list[str]], intervals: str | None
) -> SpikeTimes | SpikeCounts:
    """One session. unit: of the times, except in NWB files, which hold seconds. where, intervals: of NWB
    files alone (nwb.py). Raises ConfigError, and DataError that names file and line, unit or bin.
    """
    suffix = recording.files[0].suffix.lower()
    if suffix != ".nwb" and (where or intervals):
        raise ConfigError(f"{recording.name}: --where and --intervals are for .nwb files alone")
    for file in recording.files:
        if not file.stat().st_size:
            raise DataError(f"{file}: the file is empty")

    found: SpikeTimes | SpikeCounts
    if suffix == ".nwb":
        found = read_nwb(recording.files[0], where, intervals)
    elif suffix == ".npz":
        found = read_npz(recording.files[0], NANOSECONDS[unit])
    elif suffix == ".csv":
        found = read_csv(recording.files[0], NANOSECONDS[unit])
    else:
        trains = [read_train(file, NANOSECONDS[unit]) for file in recording.files]
        found = SpikeTimes([file.stem for file in recording.files], trains)
    if not found.units:
        raise DataError(f"{recording.name}: holds no units")
    return found


def read_train(file: Path, scale: int) -> np.ndarray:
    """One unit: a time on each line; lines that begin with # are left out. scale: nanoseconds of a 1.

    A file of such lines alone is a unit that never spiked.
    """
    times = array("q")
    lines = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                lines += bool(line.strip())
                if line.strip() and not line.lstrip().startswith("#"):
                    times.append(time_of(line, scale, f"{file}: line {number}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: line {_line_of_no_text(file)}: is not UTF-8 text: {error.reason}") from None
    if not lines:
        raise DataError(f"{file}: the file is empty")
    return np.sort(np.asarray(times, np.int64))


def read_csv(file: Path, scale: int) -> SpikeTimes:
    """A spike a line: the columns `unit` and `time`, whatever others there are."""
    times: dict[str, array[int]] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames or []
            for column in ("unit", "time"):
                if column not in columns:
                    raise DataError(
                        f"{file}: has no column {column!r}, only {', '.join(columns)}; "
                        "its first line must name the columns unit and time"
                    )
                if columns.count(column) > 1:
                    raise DataError(f"{file}: its first line names the column {column!r} twice")

            for row in reader:
                where = f"{file}: line {reader.line_num}"
                if None in row:  # such as 0,25 for 0.25
                    raise DataError(
                        f"{where}: has more cells than the {len(columns)} that the first line names; "
                        "times are written with a point"
                    )
                unit = (row["unit"] or "").strip()
                if not unit:
                    raise DataError(f"{where}: names no unit")
                times.setdefault(unit, array("q")).append(time_of(row["time"] or "", scale, where))
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: line {_line_of_no_text(file)}: is not UTF-8 text: {error.reason}") from None
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: {error}") from None

    units = sorted(times, key=natural_order)
    return SpikeTimes(units, [np.sort(np.asarray(times[unit], np.int64)) for unit in units])


def read_npz(file: Path, scale: int) -> SpikeTimes | SpikeCounts:
    """`spike_counts` (units, bins); or `spike_times`, or one unnamed array, of objects, a train each; or an
    array of times for each unit, by the name of the unit.
    """
    arrays = read_arrays(file)
    if COUNTS in arrays:
        counts = arrays[COUNTS]
        if counts.ndim != 2 or counts.dtype.kind not in "iu":
            raise DataError(
                f"{file}: {COUNTS} holds {counts.dtype} of shape {counts.shape}; "
                "expected integers (units, time bins)"
            )
        return SpikeCounts([str(number) for number in range(len(counts))], counts)

    others = ", ".join(name for name in arrays if name != TIMES)
    if TIMES in arrays and arrays[TIMES].dtype != object and (others or arrays[TIMES].ndim != 1):
        times = arrays[TIMES]
        raise DataError(
            f"{file}: {TIMES} holds {times.dtype} of shape {times.shape}{others and f', beside {others}'}; "
            "expected an array of objects, a train for each unit. Where another array names the unit of each "
            "spike, write the two as .csv, with the columns unit and time"
        )

    single = TIMES if TIMES in arrays else next(iter(arrays), "")
    if (TIMES in arrays or len(arrays) == 1) and arrays[single].dtype == object:
        if not arrays[single].ndim:
            raise DataError(f"{file}: {single} is one object; expected an array with a train for each unit")
        arrays = {str(n): _train_of(entry, file, n) for n, entry in enumerate(arrays[single])}
    trains = [nanoseconds(times, scale, f"{file}: unit {name}") for name, times in arrays.items()]
    return SpikeTimes(list(arrays), trains)


def _train_of(entry: object, file: Path, number: int) -> np.ndarray:
    """An entry of an array of objects, as the numbers that it holds."""
    try:
        return np.asarray(np.asarray(entry).tolist())
    except ValueError:  # of lists of unequal lengths
        raise DataError(f"{file}: unit {number}: holds lists in a list; expected one list of times") from None


def _line_of_no_text(file: Path) -> int:
    """The number of the first line that is not UTF-8: who reads text decodes many lines at once."""
    with file.open("rb") as stream:
        return next(number for number, line in enumerate(stream, 1) if not _is_text(line))


def _is_text(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True
