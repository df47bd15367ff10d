"""How fast one core turns stored spike counts into tokens, beside what numpy copies on the same core in the
same run; and what one large document costs, beside the same text in short rows.

    python benchmarks/data.py [--seconds 2]
    python benchmarks/data.py --document [--megabytes 5] [--batches 8 32] [--steps 20]
    python benchmarks/data.py --files 4096 [--ranks 2 4]

Writes a made-up table (as the Neural Pile: `spike_counts`, lists of lists of uint8) with `save_to_disk` into
a temporary folder, then times, in CPU seconds (the best of several rounds, one thread):
  encode   counts in memory -> ids
  source   memory-mapped arrow rows -> ids (what a lane does)
  windows  memory-mapped arrow rows -> windows of 131072 + 1 ids

With --document, a .txt of English words and a .jsonl of the same text in rows of about 1 kB, a BPE tokenizer
of 4096 ids trained on it, windows of 512 + 1 ids: CPU seconds of one encode and of building the loader (from
an empty cache, and again), and tokens per CPU second of the first steps that follow.

With --files, so many packed parquet files of 3 rows, a global batch with one row of each
(training.lane_per_file), and a whole run of 3 steps of a tiny model: seconds from the command to the first
logged step, with an empty cache and again. That the run holds row s of every file in step s is checked.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Sequence, Value

from torchtitan_rd.data import BatchDims, DatasetKeys, build_dataloader, load_tokenizer
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


def write_document(folder: Path, megabytes: float) -> str:
    """`book.txt`, the same lines as `rows.jsonl`, and a tokenizer; returns the text."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = " ".join(topics.values()).split()
    draw = random.Random(0)
    rows, size = [], 0
    while size < megabytes * 1e6:
        rows.append(" ".join(draw.choices(words, k=150)) + "\n")
        size += len(rows[-1])
    (folder / "book.txt").write_text("".join(rows), encoding="utf-8")
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(rows[:500], trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return "".join(rows)


def measure_document(megabytes: float, batches: list[int], steps: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = write_document(folder, megabytes)
        tokenizer = str(folder / "tokenizer")
        began = time.process_time()
        count = len(load_tokenizer(tokenizer).encode(text))
        print(f"one encode of {len(text) / 1e6:.1f} MB: {time.process_time() - began:.1f} s, {count} ids")

        print("file        batch   build s  again s  tokens/CPU s")
        for batch in batches:
            datasets.config.HF_DATASETS_CACHE = folder / f"cache{batch}"
            for file in ("book.txt", "rows.jsonl"):
                path = str(folder / file)
                keys = DatasetKeys(dataset="text", dataset_path=path, seq_len=512, local_batch_size=batch)

                times = []
                for _ in range(2):
                    began = time.process_time()
                    loader = build_dataloader(
                        keys,
                        BatchDims.resolve(keys, data_rank=0, data_degree=1),
                        tokenizer=load_tokenizer(tokenizer),
                        vocab_size=4096,
                        seed=0,
                        pin_memory=False,
                    )
                    times.append(time.process_time() - began)

                began = time.process_time()
                for _ in range(steps):
                    loader.next_step()
                rate_ = steps * batch * 512 / (time.process_time() - began)
                loader.close()
                print(f"{file:11s} {batch:5d} {times[0]:9.1f} {times[1]:8.1f} {rate_:9.0f}", flush=True)


def write_files(folder: Path, files: int) -> None:
    """Row r of file f holds the ids (f // 500, f % 500, r) and, as its last label, 0."""
    folder.mkdir()
    for file in range(files):
        rows = pa.array([[file // 500, file % 500, row, 0] for row in range(3)], pa.list_(pa.int32()))
        pq.write_table(pa.table({"input_ids": rows}), folder / f"{file // 512:03d}_{file % 512:05d}.parquet")


def hashes_of_rows(files: int) -> list[str]:
    """What metrics.log_data_hash must tell of the three steps of an epoch: row s of every file in step s."""
    steps = [np.array([[file // 500, file % 500, row] for file in range(files)], "<i8") for row in range(3)]
    return [hashlib.sha256(step.tobytes()).hexdigest() for step in steps]


def measure_files(files: int, ranks: list[int]) -> None:
    print("files  ranks  s to step 1  s again")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder / "rows", files)
        for degree in ranks:
            seconds = [_launch(folder, files, degree, again) for again in (False, True)]
            print(f"{files:5d} {degree:6d} {seconds[0]:12.1f} {seconds[1]:8.1f}", flush=True)


def _launch(folder: Path, files: int, ranks: int, again: bool) -> float:
    """Seconds until the first step of a run is logged."""
    dump = folder / f"dump{ranks}{again}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "torchtitan_rd.train", f"--job.dump_folder={dump}", "--training.dataset=packed"]
    command += [f"--training.dataset_path={folder / 'rows'}", "--training.lane_per_file"]
    command += [f"--training.local_batch_size={files // ranks}", f"--training.global_batch_size={files}"]
    command += ["--training.seq_len=3", "--training.steps=3", "--model.vocab_size=512"]
    command += ["--model.overrides.n_layers=1", "--model.overrides.dim=32"]
    command += ["--metrics.log_freq=1", "--metrics.log_data_hash"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / f"cache{ranks}")}

    began, seconds, lines = time.monotonic(), 0.0, []
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            lines.append(line)
            if "step: 1 " in line:
                seconds = time.monotonic() - began

    if process.returncode:
        raise SystemExit("".join(lines))
    rows = [json.loads(line) for line in (dump / "metrics.jsonl").read_text().splitlines()]
    if [row["data_hash"] for row in rows] != hashes_of_rows(files):
        raise SystemExit("a step does not hold row s of every file")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds per figure")
    parser.add_argument("--document", action="store_true", help="one large document instead of spikes")
    parser.add_argument("--megabytes", type=float, default=5.0, help="of the document")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--files", type=int, default=0, help="start-up with so many packed files")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    if arguments.files:
        measure_files(arguments.files, arguments.ranks)
        return
    if arguments.document:
        measure_document(arguments.megabytes, arguments.batches, arguments.steps)
        return
    seconds = arguments.seconds

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
