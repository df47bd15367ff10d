"""How fast one core turns stored spike counts into tokens, beside what numpy copies on the same core in the same run.

    python benchmarks/data.py [--seconds 2]

Writes a made-up table (as the Neural Pile: `spike_counts`, lists of lists of uint8) with `save_to_disk` into a
temporary folder, then times, in CPU seconds (the best of several rounds, one thread):
  encode   counts in memory -> ids
  source   memory-mapped arrow rows -> ids (what a lane does)
  windows  memory-mapped arrow rows -> windows of 131072 + 1 ids
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Sequence, Value

from torchtitan_rd.data.arrow import TableSource, open_table
from torchtitan_rd.data.cursor import Cursor, LaneReader
from torchtitan_rd.data.spikes import SpikeEncoder, SyntheticRecordings

TARGET = 50e6
SEQ_LEN = 131072


def rate(work: Callable[[], int], seconds: float) -> float:
    """Units per CPU second of `work`, which returns how many it did; the best round of at least three."""
    best, began, rounds = 0.0, time.process_time(), 0
    while rounds < 3 or time.process_time() - began < seconds:
        start = time.process_time()
        done = work()
        best = max(best, done / (time.process_time() - start))
        rounds += 1
    return best


def write_table(folder: str, samples: int) -> None:
    recordings = SyntheticRecordings(seed=0)
    generator = np.random.default_rng(0)
    counts = [generator.poisson(0.3, recordings[i].shape).astype(np.uint8) for i in range(samples)]
    features = Features({"spike_counts": Sequence(Sequence(Value("uint8")))})
    Dataset.from_dict({"spike_counts": counts}, features=features).save_to_disk(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds per figure")
    seconds = parser.parse_args().seconds

    block = np.zeros(64 << 20, np.uint8)
    target = np.empty_like(block)

    def copy() -> int:
        np.copyto(target, block)
        return block.size

    with tempfile.TemporaryDirectory() as folder:
        write_table(str(Path(folder, "table")), samples=32)
        source = TableSource(
            "benchmark", open_table("benchmark", str(Path(folder, "table")), None, False), SpikeEncoder()
        )
        encoder = SpikeEncoder()
        counts = np.random.default_rng(0).poisson(0.3, (500, 1000)).astype(np.uint8)
        lane = LaneReader(source, 0, 1, SEQ_LEN)

        def encode() -> int:
            return sum(encoder.encode(counts, "benchmark").size for _ in range(20))

        def read_source() -> int:
            return sum(source.tokens(i).size for i in range(len(source)))

        def read_windows() -> int:
            cursor = Cursor()
            for _ in range(100):
                cursor = lane.read(cursor).position
            return 100 * (SEQ_LEN + 1)

        print(f"reference: numpy copies {rate(copy, seconds) / 1e6:10.0f} M bytes per second on one core")
        for name, work in (("encode", encode), ("source", read_source), ("windows", read_windows)):
            found = rate(work, seconds)
            verdict = f"target {TARGET / 1e6:.0f}: {'met' if found >= TARGET else 'MISSED'}"
            print(f"{name:9s}: {found / 1e6:10.0f} M spike tokens per second per core ({verdict})")


if __name__ == "__main__":
    main()
