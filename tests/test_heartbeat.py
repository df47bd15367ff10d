"""The heartbeat: the rank that hangs is named, whether its thread sleeps or its whole process is stopped."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from tests.ranks import run_on_ranks
from torchtitan_rd.heartbeat import Heartbeat
from torchtitan_rd.log import logger


class Collected(logging.Handler):
    """A context in which the package's log records are collected."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def warnings(self) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == logging.WARNING]

    def __enter__(self):
        self._level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_):
        logger.removeHandler(self)
        logger.setLevel(self._level)


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def read(folder: Path, rank: int) -> dict:
    return json.loads((folder / f"rank_{rank}.json").read_text())


def hang_on_rank_1(rank, world_size, folder):
    """Rank 1 hangs while it loads data; rank 0 goes on and waits for it in a collective."""
    with Collected() as log:
        heartbeat = Heartbeat(Path(folder), rank=rank, world_size=world_size, interval=0.1, warn_after=1.0)
        heartbeat.beat(7, "data")
        if rank == 1:
            time.sleep(2.6)
        heartbeat.beat(7, "forward")
        dist.barrier()
        heartbeat.beat(8, "data")
        if rank == 0:
            wait_until(lambda: log.records[-1].getMessage() == "the ranks advance again")
        dist.barrier()
        heartbeat.close()
        return log.warnings()


def test_a_rank_whose_thread_hangs_is_named_with_its_phase_again_after_doubling(tmp_path):
    first, second = run_on_ranks(2, hang_on_rank_1, str(tmp_path))[0]
    for warning in (first, second):
        assert "behind the others: rank 1 (host " in warning
        assert "step 7, phase data" in warning and "rank 0" not in warning
    assert "advanced for 1 s" in first and "advanced for 2 s" in second
    stacks = (tmp_path / "rank_1.stacks").read_text()
    assert "in hang_on_rank_1" in stacks


RANK_1 = """
import sys, time
from pathlib import Path
from torchtitan_rd.heartbeat import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]), rank=1, world_size=2, interval=0.1, warn_after=1.0)
for step in range(1, 10**6):
    heartbeat.beat(step, "forward")
    time.sleep(0.05)
"""


def test_a_rank_whose_process_is_stopped_is_named(tmp_path):
    with Collected() as log:
        heartbeat = Heartbeat(tmp_path, rank=0, world_size=2, interval=0.1, warn_after=1.0)
        process = subprocess.Popen([sys.executable, "-c", RANK_1, str(tmp_path)])
        try:
            wait_until(lambda: (tmp_path / "rank_1.json").exists() and read(tmp_path, 1)["step"] > 3)
            os.kill(process.pid, signal.SIGSTOP)
            stopped_at = read(tmp_path, 1)["step"]
            heartbeat.beat(stopped_at, "data")  # before, beside or beyond rank 1: it is silent, so it is the suspect
            wait_until(log.warnings)
        finally:
            process.kill()
            process.wait()
            heartbeat.close()
    (warning,) = log.warnings()
    assert "no sign of life from rank 1 (host " in warning and "rank 0" not in warning
    assert f"pid {process.pid}, step {stopped_at}, phase forward" in warning


def test_a_rank_that_never_starts_is_named(tmp_path):
    with Collected() as log:
        heartbeat = Heartbeat(tmp_path, rank=0, world_size=2, interval=0.05, warn_after=0.3)
        wait_until(log.warnings)
        heartbeat.close()
    assert "no sign of life from rank 1 (no heartbeat file yet" in log.warnings()[0]


def test_files_of_an_earlier_larger_run_are_not_taken_for_ranks(tmp_path):
    for rank in (1, 5):
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps({"step": 99, "index": 0, "time": 0}))
    Heartbeat(tmp_path, rank=0, world_size=2, interval=10, warn_after=60).close()
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0.json"]


def test_ranks_that_all_wait_in_the_same_place_are_reported_without_a_culprit(tmp_path):
    with Collected() as log:
        heartbeat = Heartbeat(tmp_path, rank=0, world_size=1, interval=0.05, warn_after=0.3)
        heartbeat.beat(3, "backward")
        wait_until(log.warnings)
        heartbeat.close()
    assert "all are alive and at the same place: step 3, phase backward" in log.warnings()[0]


def test_a_second_hang_is_reported_as_soon_as_the_first(tmp_path):
    with Collected() as log:
        heartbeat = Heartbeat(tmp_path, rank=0, world_size=1, interval=0.05, warn_after=0.5)
        for step in (1, 2):
            heartbeat.beat(step, "data")
            wait_until(lambda step=step: len(log.warnings()) == step)
        heartbeat.close()
    first, again, second = [record.getMessage() for record in log.records]
    assert "step 1" in first and again == "the ranks advance again" and "step 2" in second


def test_ranks_that_advance_cause_no_warning(tmp_path):
    with Collected() as log:
        heartbeat = Heartbeat(tmp_path, rank=0, world_size=1, interval=0.02, warn_after=0.5)
        for step in range(30):
            heartbeat.beat(step, "forward")
            time.sleep(0.03)
        heartbeat.close()
    assert log.records == []


def test_the_file_says_where_the_rank_stands_and_that_it_closed(tmp_path):
    heartbeat = Heartbeat(tmp_path, rank=3, world_size=4, interval=0.02, warn_after=60)
    heartbeat.beat(2, "data")
    heartbeat.beat(2, "forward")
    wait_until(lambda: read(tmp_path, 3)["phase"] == "forward")
    beat = read(tmp_path, 3)
    assert (beat["rank"], beat["pid"], beat["step"], beat["index"]) == (3, os.getpid(), 2, 1)
    assert beat["since"] <= beat["time"] <= time.time()
    heartbeat.close()
    heartbeat.close()
    assert read(tmp_path, 3)["phase"] == "closed"


def test_an_interval_of_0_switches_it_off(tmp_path):
    heartbeat = Heartbeat(tmp_path / "heartbeat", rank=0, world_size=1, interval=0, warn_after=0.01)
    heartbeat.beat(1, "data")
    heartbeat.close()
    assert not (tmp_path / "heartbeat").exists()


def test_a_folder_that_cannot_be_written_is_reported_once_and_does_not_stop_training(tmp_path):
    with Collected() as log:
        heartbeat = Heartbeat(tmp_path / "gone", rank=1, world_size=2, interval=0.02, warn_after=60)
        (tmp_path / "gone" / "rank_1.json").unlink()
        (tmp_path / "gone").rename(tmp_path / "moved")
        wait_until(log.warnings)
        time.sleep(0.1)
        heartbeat.close()
    (warning,) = log.warnings()
    assert "heartbeat: cannot write" in warning and "rank_1.json" in warning
