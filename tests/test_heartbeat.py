"""The heartbeat: the rank that hangs is named, whether its thread sleeps or its whole process is stopped."""

import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.fork_server import start_python
from tests.ranks import run_on_ranks
from torchtitan_rd import heartbeat as module
from torchtitan_rd.heartbeat import Heartbeat, Pace
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
    (beat,) = json.loads((folder / f"rank_{rank}.json").read_text())
    return beat


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
        process = start_python("-c", RANK_1, tmp_path)
        try:
            wait_until(lambda: (tmp_path / "rank_1.json").exists() and read(tmp_path, 1)["step"] > 3)
            os.kill(process.pid, signal.SIGSTOP)
            stopped_at = read(tmp_path, 1)["step"]
            # Before, beside or beyond rank 1: it is silent, so it is the suspect.
            heartbeat.beat(stopped_at, "data")
            wait_until(log.warnings)
        finally:
            process.close()
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
        (tmp_path / f"rank_{rank}.json").write_text(
            json.dumps([{"rank": rank, "step": 99, "index": 0, "time": 0}])
        )
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


def node_of(tmp_path: Path, local_rank: int, warn_after: float = 60.0) -> Heartbeat:
    """One of the two ranks of the second of two nodes, in a run that is too large for a file a rank."""
    return Heartbeat(
        tmp_path / "shared",
        rank=2 + local_rank,
        world_size=4,
        interval=0.02,
        warn_after=warn_after,
        local_rank=local_rank,
        local_world_size=2,
        most_files=3,
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_in_a_large_run_the_ranks_of_a_node_share_one_file_and_leave_none_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_node_folder", lambda folder: tmp_path / "memory")
    first, second = node_of(tmp_path, 0), node_of(tmp_path, 1)
    second.beat(5, "forward")

    def gathered():
        return json.loads((tmp_path / "shared" / "rank_2.json").read_text())

    wait_until(lambda: [(beat["rank"], beat["step"]) for beat in gathered()] == [(2, 0), (3, 5)])
    assert [name for name in files(tmp_path / "shared") if not name.startswith(".")] == ["rank_2.json"]
    assert "rank_3.json" in files(tmp_path / "memory")
    second.close()
    first.close()
    assert [beat["phase"] for beat in gathered()] == ["closed", "closed"]
    assert not (tmp_path / "memory").exists()


def test_a_rank_that_closes_after_its_node_s_first_one_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_node_folder", lambda folder: tmp_path / "memory")
    first, second = node_of(tmp_path, 0), node_of(tmp_path, 1)
    second._interval = first._interval = 60  # so that only `close` writes from here
    first._closing.set(), second._closing.set()
    with Collected() as log:
        first.close()
        second.close()
    assert not log.records and not (tmp_path / "memory").exists()


def test_what_a_killed_run_left_in_the_node_s_memory_is_no_beat_of_this_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_node_folder", lambda folder: tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "rank_3.json").write_text(json.dumps([{"rank": 3, "step": 99}]))
    node_of(tmp_path, 0).close()
    assert [beat["rank"] for beat in json.loads((tmp_path / "shared" / "rank_2.json").read_text())] == [2]


@pytest.mark.parametrize(("world_size", "names"), [(256, ["rank_5.json"]), (260, [])])
def test_above_256_ranks_only_the_first_of_a_node_writes_to_the_shared_folder(
    world_size, names, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "_node_folder", lambda folder: tmp_path / "memory")
    place = {"rank": 5, "world_size": world_size, "local_rank": 1, "local_world_size": 4}
    Heartbeat(tmp_path / "shared", interval=60, warn_after=60, **place).close()
    assert files(tmp_path / "shared") == names


def test_a_rank_whose_file_is_seen_late_is_not_called_dead_in_a_slow_run(tmp_path):
    """Of a silence of 40 s where 30 s are healthy: beats 10 s old are late, those 20 s old have stopped."""
    heartbeat = Heartbeat(tmp_path, rank=0, world_size=2, interval=0.0, warn_after=30)
    for age, expected in ((10.0, "behind the others: rank 1"), (20.0, "no sign of life from rank 1")):
        beats = [{"host": "h", "pid": 1, "step": step, "index": 0, "phase": "data"} for step in (8, 7)]
        heartbeat._seen = [module._Seen(beats[0], 60.0, 100.0), module._Seen(beats[1], 60.0, 100.0 - age)]
        assert expected in heartbeat._report(40.0, 100.0)


def test_in_a_large_run_rank_0_still_names_the_rank_that_lags(tmp_path, monkeypatch):
    folders = {}
    monkeypatch.setattr(module, "_node_folder", lambda folder: folders["now"])
    beats = []
    with Collected() as log:
        for rank in (3, 2, 1, 0):
            folders["now"] = tmp_path / f"node_{rank // 2}"
            beats.append(
                Heartbeat(
                    tmp_path / "shared",
                    rank=rank,
                    world_size=4,
                    interval=0.05,
                    warn_after=0.8,
                    local_rank=rank % 2,
                    local_world_size=2,
                    most_files=3,
                )
            )
        for number, heartbeat in enumerate(beats):
            heartbeat.beat(7, "data")
            if number != 0:  # all but rank 3, which is no node's first
                heartbeat.beat(7, "forward")
        wait_until(log.warnings)
        for heartbeat in beats:
            heartbeat.close()
    assert "behind the others: rank 3 (host " in log.warnings()[0] and "rank 2" not in log.warnings()[0]
    assert not [name for name in files(tmp_path / "shared") if name in ("rank_1.json", "rank_3.json")]


def test_the_ranks_of_a_node_agree_where_to_meet_and_other_runs_meet_elsewhere(tmp_path):
    first = module._node_folder(tmp_path / "a")
    assert first == module._node_folder(tmp_path / "b" / ".." / "a") and first.parent.is_dir()
    assert first != module._node_folder(tmp_path / "b")


def steps(pace: Pace, count: int, seconds: dict[str, float], start: float = 0.0) -> float:
    """Enters the phases of `count` steps, one after the other;
    returns the time at which the last one ends.
    """
    now = start
    for number in range(count):
        for phase, took in seconds.items():
            pace.enter(int(start) + number + 1, phase, now)
            now += took
    return now


def test_a_healthy_step_of_90_seconds_is_no_hang_and_three_times_as_long_is():
    pace = Pace(minimum=60, first_time=0)
    seconds = {"data": 0.1, "microbatch 1 of 1": 80.0, "update": 9.5, "checkpoint": 0.4}
    now = steps(pace, 5, seconds)
    for phase in seconds:
        pace.enter(10**6, phase, now)
        assert pace.allowed == pytest.approx(270)


def test_a_fast_run_is_judged_by_the_key():
    pace = Pace(minimum=60, first_time=0)
    steps(pace, 5, {"data": 0.001, "forward": 0.01})
    assert pace.allowed == 60


def test_a_phase_that_is_longer_than_a_step_is_judged_by_its_own_length():
    """Validation and saving come rarely: the median step knows nothing of them."""
    pace = Pace(minimum=60, first_time=0)
    now = steps(pace, 30, {"data": 1.0, "forward": 20.0})
    pace.enter(100, "validation", now)
    assert pace.allowed == pytest.approx(63)
    pace.enter(101, "data", now + 400)
    assert pace.allowed == pytest.approx(63), "one long step moves no median"
    pace.enter(101, "validation", now + 401)
    assert pace.allowed == pytest.approx(1200)


def test_what_has_not_been_done_once_may_take_as_long_as_start_up():
    pace = Pace(minimum=60, first_time=300)
    assert pace.allowed == 300
    pace.enter(1, "microbatch 1 of 2", 0.0)
    assert pace.allowed == 300, "compilation"
    pace.enter(1, "microbatch 2 of 2", 100.0)
    assert pace.allowed == 300, "three times the only one so far"
    for step in range(2, 40):
        pace.enter(step, "microbatch 1 of 2", 100.0 + step)
    assert pace.allowed == 60
    pace.enter(40, "validation", 200.0)
    assert pace.allowed == 300


def test_one_stall_does_not_make_the_watch_deaf():
    pace = Pace(minimum=1, first_time=0)
    now = steps(pace, 20, {"data": 0.5, "forward": 0.5})
    pace.enter(100, "data", now)
    pace.enter(101, "data", now + 1000)
    assert pace.allowed == pytest.approx(3)


def test_the_watch_follows_the_pace(tmp_path):
    """Steps of 0.4 s at a minimum of 0.05 s, 1 : 200 of the real thing: no warning. Then a hang: one."""
    with Collected() as log:
        heartbeat = Heartbeat(tmp_path, rank=0, world_size=1, interval=0.02, warn_after=0.05, first_time=5.0)
        for step in range(1, 5):
            heartbeat.beat(step, "forward")
            time.sleep(0.4)
        heartbeat.beat(5, "forward")
        assert log.warnings() == [] and files(tmp_path) == ["rank_0.json"], "nor stacks"
        wait_until(log.warnings)
        heartbeat.close()
    assert "rank_0.stacks" in files(tmp_path)
    silence = float(log.warnings()[0].split("for ")[1].split(" s;")[0])
    assert silence >= 1, "three times 0.4 s, printed without decimals"
