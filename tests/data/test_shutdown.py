"""Programs that read data end cleanly, however they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.fork_server import run_python

PROGRAM = """
import multiprocessing, sys, time
from torchtitan_rd.data import BatchDims, DatasetKeys, build_dataloader, load_tokenizer
if __name__ == "__main__":
    keys = DatasetKeys(local_batch_size=2, {keys})
    dims = BatchDims.resolve(keys, data_rank=0, data_degree=1)
    text = {{"tokenizer": load_tokenizer("bytes"), "vocab_size": 258}}
    loader = build_dataloader(keys, dims, **text, seed=0, pin_memory=False)
    loader.next_step()
    loader.next_step()
    {end}
"""


def run(keys, end, start=run_python):
    return start("-c", PROGRAM.format(keys=keys, end=end), timeout=60)


def from_scratch(*command, timeout):
    """A new interpreter, which imports in its own order what it takes apart at the end."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.parquet"
    pq.write_table(pa.table({"text": [f"document {i} " * 50 for i in range(500)]}), path, row_group_size=10)
    return f"dataset='text', dataset_path={str(path)!r}, stream=True, seq_len=64"


@pytest.mark.parametrize("end", ["loader.close()", "pass"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_program_that_streams_parquet_ends_with_0_and_says_nothing(workers, end, parquet):
    result = run(f"{parquet}, num_workers={workers}", end, start=run_python if workers else from_scratch)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "end", ["loader.close(); assert not multiprocessing.active_children()", "sys.exit(0)"]
)
def test_a_program_with_workers_ends_with_0_and_says_nothing(end):
    result = run("seq_len=64, num_workers=2", end)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_exception_in_the_program_is_all_that_it_says():
    result = run("seq_len=64, num_workers=2", "raise SystemExit('the cause')")
    assert (result.returncode, result.stderr) == (1, "the cause\n")


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_workers_outlive_signals_to_the_group_and_end_with_a_killed_program():
    end = "print(*[p.pid for p in multiprocessing.active_children()], flush=True); time.sleep(60)"
    code = PROGRAM.format(keys="dataset='synthetic', seq_len=131072, num_workers=2", end=end)
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in program.stdout.readline().split()]
    try:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            for pid in workers:
                os.kill(pid, getattr(signal, name))
        time.sleep(0.5)
        assert len(workers) == 2 and all(map(_runs, workers))
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
