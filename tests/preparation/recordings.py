"""Real spikes, and what `data prepare-spikes` makes of recordings.

tests/assets/grasshopper holds two spike trains of an auditory receptor, in microseconds, as the package
nitime distributes them (BSD; LICENSE lies beside them). They are not simultaneous.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tests.preparation.common import run

GRASSHOPPER = Path(__file__).parent.parent / "assets" / "grasshopper"
TRAINS = [GRASSHOPPER / f"grasshopper_spike_times{number}.txt" for number in (1, 2)]


def prepare(out, *arguments):
    return run("prepare-spikes", "--output", out, *arguments)


def rows_of(out, split="*"):
    tables = [pq.read_table(path).to_pylist() for path in sorted(out.glob(f"{split}-*.parquet"))]
    return [row for table in tables for row in table]


def sessions_of(out):
    """(source, session) -> counts (neurons, bins), its rows put together again."""
    sessions = {}
    for row in sorted(rows_of(out), key=lambda row: row["first_bin"]):
        sessions.setdefault((row["source_dataset"], row["session"]), []).append(row)
    for rows in sessions.values():
        lengths = [len(row["spike_counts"][0]) for row in rows]
        assert [row["first_bin"] for row in rows] == np.cumsum([0, *lengths[:-1]]).tolist()
    return {
        name: np.concatenate([row["spike_counts"] for row in rows], axis=1) for name, rows in sessions.items()
    }
