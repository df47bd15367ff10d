"""Neurodata Without Borders: the units of an .nwb file, read with pynwb (the extra `nwb`)."""

from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_rd.config_loader import nearest
from torchtitan_rd.errors import ConfigError, DataError
from torchtitan_rd.preparation.spike_times import END, NANOSECONDS, SpikeTimes, nanoseconds


def read_nwb(file: Path, where: dict[str, list[str]], intervals: str | None) -> SpikeTimes:
    """The table `units`, whose spike times are seconds from the session's reference time: those of what was
    recorded before it are negative.

    where: column -> values; a unit is read if it has one of them in each. A column that the units lack is
    looked for in the table of their electrodes (`location`, for instance), where one fitting electrode is
    enough. intervals: a table of intervals (`trials`, `epochs`, ...), of which each row becomes a recording
    of its own. Raises ConfigError, DataError.
    """
    try:
        import pynwb
    except ImportError:
        raise ConfigError(f"{file}: reading .nwb needs pynwb: pip install 'torchtitan_rd[nwb]'") from None
    try:
        opened = pynwb.NWBHDF5IO(str(file), "r")
        session = opened.read()
    except Exception as error:  # of h5py, hdmf and pynwb: a library boundary
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{file}: cannot be read as NWB: {line}") from error

    with opened:
        table = session.units
        if table is None or "spike_times" not in table.colnames:
            raise DataError(f"{file}: has no table of units with spike times")
        rows = [row for row in range(len(table)) if _is_wanted(table, row, where, file)]
        if not rows:
            wanted = ", ".join(f"{column} = {' or '.join(values)}" for column, values in where.items())
            known = "; ".join(f"{column}: {', '.join(_values(table, column, file))}" for column in where)
            raise DataError(f"{file}: has no unit{f' with {wanted}; there are {known}' if where else ''}")
        units = [str(table.id[row]) for row in rows]
        trains = [
            nanoseconds(np.asarray(table["spike_times"][row]), NANOSECONDS["s"], f"{file}: unit {unit}", -END)
            for row, unit in zip(rows, units, strict=True)
        ]
        return SpikeTimes(units, trains, None if intervals is None else _windows(session, intervals, file))


def _is_wanted(table: Any, row: int, where: dict[str, list[str]], file: Path) -> bool:
    return all(
        any(value in values for value in _values_of(table, row, column, file))
        for column, values in where.items()
    )


def _values_of(table: Any, row: int, column: str, file: Path) -> list[str]:
    """What a unit has in a column: of its own, which may be a list, or of its electrodes."""
    if column in table.colnames:
        value = table[column][row]
        return [str(one) for one in (value if isinstance(value, list | np.ndarray) else [value])]
    electrodes = table["electrodes"].target.table if "electrodes" in table.colnames else None
    if electrodes is None or column not in electrodes.colnames:
        known = [*table.colnames, *(electrodes.colnames if electrodes is not None else ())]
        raise ConfigError(
            f"--where {column}: neither the units of {file} nor their electrodes have such a column"
            f"{nearest(column, known)}; there are {', '.join(known)}"
        )
    return [str(value) for value in table["electrodes"][row][column]]


def _values(table: Any, column: str, file: Path) -> list[str]:
    return sorted({value for row in range(len(table)) for value in _values_of(table, row, column, file)})


def _windows(session: Any, name: str, file: Path) -> list[tuple[int, int]]:
    """The rows of a table of intervals, in nanoseconds."""
    tables = dict(session.intervals) if session.intervals else {}
    tables |= {
        known: getattr(session, known)
        for known in ("trials", "epochs")
        if getattr(session, known) is not None
    }
    if name not in tables:
        raise DataError(
            f"{file}: has no intervals {name!r}{nearest(name, tables)}; "
            f"there are {', '.join(tables) or 'none'}"
        )
    bounds = []
    for row in range(len(tables[name])):
        pair = np.array([tables[name][column][row] for column in ("start_time", "stop_time")], np.float64)
        longest = END / NANOSECONDS["s"]
        if not (np.isfinite(pair).all() and -longest < pair[0] <= pair[1] < longest):
            raise DataError(f"{file}: {name}, row {row}: {pair[0]} to {pair[1]} seconds is no interval")
        start, stop = np.rint(pair * NANOSECONDS["s"]).astype(np.int64)
        bounds.append((int(start), int(stop)))
    return bounds
