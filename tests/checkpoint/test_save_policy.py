"""`checkpoint.on_save_error`, and saves that take longer than a job lives on after its signal."""

import errno
import json
import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from tests.checkpoint.test_durability import ARGUMENTS
from tests.launch import rows
from tests.ranks import run_on_ranks
from torchtitan_rd import job, train
from torchtitan_rd.checkpoint import saves
from torchtitan_rd.checkpoint.save_errors import LostRankError
from torchtitan_rd.checkpoint.save_time import SAVE_SECONDS, SaveTime
from torchtitan_rd.checkpoint.writer import Writer
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.job import Environment
from torchtitan_rd.train_step import TrainStep

WARN = ["--checkpoint.on_save_error=warn", "--checkpoint.interval=1", "--metrics.log_freq=1"]


@pytest.fixture
def failing(monkeypatch):
    """-> the steps whose saves fail"""
    write, steps = Writer.write, set()

    def write_or_fail(self, snapshot):
        if snapshot.step in steps:
            raise CheckpointError(f"no space for step {snapshot.step}")
        write(self, snapshot)

    monkeypatch.setattr(Writer, "write", write_or_fail)
    return steps


def run(dump, *more: str) -> int:
    code = train.main([*ARGUMENTS, *WARN, f"--job.dump_folder={dump}", *more])
    if dist.is_initialized():  # a run that fails leaves that to the end of its process
        dist.destroy_process_group()
    return code


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_goes_on_over_failed_saves_that_are_counted_and_told(tmp_path, failing, mode, capfd):
    """Two in a row are not three: a save that succeeds begins the count anew."""
    failing |= {1, 2, 4, 5}
    assert run(tmp_path, "--training.steps=7", f"--checkpoint.async_mode={mode}") == 0
    assert names(tmp_path) == ["step-3", "step-6", "step-7"]
    counts = [row["failed_saves"] for row in rows(tmp_path)]
    if mode == "disabled":  # a row comes before the save of its own step
        assert counts == [0, 1, 2, 2, 3, 4, 4]
    assert counts[-1] == 4
    told = [line for line in capfd.readouterr().err.splitlines() if "save error" in line]
    assert [line.partition("save error ")[2][:1] for line in told] == ["1", "2", "1", "2"]
    assert [f"no space for step {step}" in line for step, line in zip((1, 2, 4, 5), told, strict=True)]


def test_the_last_of_too_many_failures_in_a_row_ends_the_run(tmp_path, failing, capfd):
    failing |= {2, 3, 4}
    assert run(tmp_path, "--training.steps=9") == 1
    errors = capfd.readouterr().err
    assert errors.count("save error ") == 3
    assert (
        "3 saves in a row have failed (checkpoint.max_save_errors); the last: no space for step 4" in errors
    )
    told = json.loads((tmp_path / "exit_status.json").read_text())
    assert (told["status"], told["step"], names(tmp_path)) == ("failed", 4, ["step-1"])
    failing.clear()
    assert run(tmp_path, "--training.steps=9") == 0  # the same command goes on from the last good one
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 10))


def test_by_default_the_first_failure_ends_the_run_and_rows_count_none(tmp_path, failing):
    failing.add(2)
    assert run(tmp_path, "--training.steps=3", "--checkpoint.on_save_error=raise") == 1
    assert [("failed_saves" in row, row["step"]) for row in rows(tmp_path)] == [(False, 1), (False, 2)]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_the_last_save_may_not_fail(tmp_path, failing, mode):
    failing.add(3)
    assert run(tmp_path, "--training.steps=3", f"--checkpoint.async_mode={mode}") == 1
    assert json.loads((tmp_path / "exit_status.json").read_text())["status"] == "failed"
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_whose_save_after_a_signal_fails_is_not_called_preempted(tmp_path, failing, mode, monkeypatch):
    """It would be requeued, and lose a step that it claims to have saved."""
    call = TrainStep.__call__

    def signalled(self, step, *arguments):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, step, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", signalled)
    failing.add(2)
    assert run(tmp_path, "--training.steps=9", f"--checkpoint.async_mode={mode}") == 1
    assert json.loads((tmp_path / "exit_status.json").read_text())["status"] == "failed"


def counting_body(rank, world_size, dump, mode):
    """The last rank has a full disk at steps 2, 3 and 5; -> after each save: count, whether it is there"""
    checkpoints = checkpointer(dump, on_save_error="warn", async_mode=mode)
    write_data, full, seen = FileSystemWriter.write_data, [], []

    def no_space(self, plan, planner):
        if full and rank == world_size - 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        return write_data(self, plan, planner)

    FileSystemWriter.write_data = no_space
    try:
        for step in range(1, 7):
            full[:] = [step] if step in (2, 3, 5) else []
            checkpoints.save(step, training_state(step), {"step": step})
            checkpoints.wait()
            seen.append((checkpoints.describe()["failed_saves"], checkpoints.is_committed(step)))
    finally:
        FileSystemWriter.write_data = write_data
        checkpoints.close()
    return seen


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_count_what_fails_on_one(tmp_path, world_size, mode):
    results = run_on_ranks(world_size, counting_body, tmp_path, mode)
    expected = [(0, True), (1, False), (2, False), (2, True), (3, False), (3, True)]
    assert results == [expected] * world_size
    assert names(tmp_path) == ["step-1", "step-4", "step-6"], "no staging is left"
    assert load_once(tmp_path) == ({"step": 6}, digest(training_state(6)))


def test_too_little_room_is_a_save_that_fails(tmp_path, monkeypatch):
    checkpoints = checkpointer(tmp_path, on_save_error="warn")
    monkeypatch.setattr(type(checkpoints._folder), "free_bytes", lambda self: 10)
    checkpoints.save(1, training_state(1), {"step": 1})
    assert checkpoints.describe() == {"failed_saves": 1} and not checkpoints.is_committed(1)
    monkeypatch.undo()
    checkpoints.save(2, training_state(2), {"step": 2})
    checkpoints.close()
    assert names(tmp_path) == ["step-2"]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_folder_that_another_run_has_taken_over_ends_the_run_in_any_case(tmp_path, mode):
    save_steps(tmp_path, [1])
    checkpoints = checkpointer(tmp_path, on_save_error="warn", async_mode=mode)
    (tmp_path / "checkpoint" / ".lock").write_text('{"host": "another", "pid": 1}')
    with pytest.raises(CheckpointError, match="another run uses the folder"):
        checkpoints.save(2, training_state(2), {"step": 2})
        checkpoints.wait()
    checkpoints.close()
    assert names(tmp_path) == ["step-1"]


def test_a_save_that_lost_a_rank_ends_the_run_in_any_case(tmp_path, monkeypatch):
    def lost(self, snapshot, staging):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torchtitan_rd.checkpoint.rank_group.RankGroup.agree", lambda self, action: action())
    monkeypatch.setattr(Writer, "_write_shards", lost)
    checkpoints = checkpointer(tmp_path, on_save_error="warn")
    with pytest.raises(LostRankError, match="lost contact with another rank: Connection closed"):
        checkpoints.save(1, training_state(1), {"step": 1})
    checkpoints.close()


def test_a_failed_seed_is_an_error(tmp_path, failing):
    failing.add(0)
    assert run(tmp_path, "--training.steps=3", "--checkpoint.create_seed_checkpoint") == 1


LONG = "a job is killed 1 s after the signal"


@pytest.mark.parametrize("who_says", ["the key", "torchrun"])
def test_saves_longer_than_half_the_grace_are_told_at_once_and_at_the_next_start(
    who_says, tmp_path, monkeypatch, capfd
):
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda self, snapshot: (time.sleep(0.6), write(self, snapshot)))
    keys = ["--training.steps=2", *(["--checkpoint.grace_seconds=1"] if who_says == "the key" else [])]
    if who_says == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")
    assert run(tmp_path, *keys) == 0
    assert capfd.readouterr().err.count(LONG) == 1
    monkeypatch.setattr(Writer, "write", write)
    assert run(tmp_path, *keys) == 0  # nothing is left to save
    (line,) = [line for line in capfd.readouterr().err.splitlines() if LONG in line]
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in line and "checkpoint.grace_seconds" in line


def test_a_mean_of_saves_decides_and_a_warning_is_repeated_when_it_has_doubled(tmp_path, caplog):
    def told(*seconds: float) -> list[bool]:
        found = []
        for one in seconds:
            caplog.clear()
            save_time.add(one)
            found.append("the steps since the last checkpoint" in caplog.text)
        return found

    caplog.set_level("WARNING", logger="torchtitan_rd")
    save_time = SaveTime(tmp_path, 30)
    # 5, 5 + 0.3 * 25 = 12.5, then 12.5 + 0.3 * 17.5 = 17.75 s, and so on towards 30 and 80
    assert told(5, 30, 30, 30, 30) == [False, False, True, False, False]
    assert told(80, 80) == [True, False]
    assert json.loads((tmp_path / SAVE_SECONDS).read_text())["seconds"] == save_time.seconds


def test_without_a_known_grace_nothing_is_written_and_a_torn_file_is_none(tmp_path):
    SaveTime(tmp_path, None).add(1000.0)
    assert not list(tmp_path.iterdir())
    (tmp_path / SAVE_SECONDS).write_text("{")
    assert SaveTime(tmp_path, 30).seconds is None


@pytest.mark.parametrize(
    ("variables", "grace"),
    [
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "none"}, 30.0),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}, 240.0),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}, None),
    ],
)
def test_the_grace_is_what_torchrun_waits(monkeypatch, variables, grace):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Environment.read().grace_seconds == grace


def test_the_torchrun_of_2_11_waits_30_seconds_whatever_the_variable_says(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")
    assert Environment.read().grace_seconds == 30.0


@pytest.mark.parametrize("patience", [0.2, None])
def test_a_run_that_has_lost_a_rank_gives_the_save_in_flight_up(tmp_path, monkeypatch, patience, log_lines):
    """Its thread waits for that rank, and Python's end would wait for the thread. Others wait for it."""
    rank_is_back, left = threading.Event(), []
    write = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *arguments: (rank_is_back.wait(10), write(*arguments)))
    monkeypatch.setattr(saves, "_STUCK", [])
    monkeypatch.setattr(os, "_exit", left.append)
    checkpoints = checkpointer(tmp_path, async_mode="async")
    checkpoints.save(1, training_state(1), {"step": 1})
    if patience is None:
        threading.Timer(0.3, rank_is_back.set).start()
    started = time.monotonic()
    checkpoints.close(patience)
    assert 0.2 <= time.monotonic() - started < 30
    assert names(tmp_path)[-1:] == (["step-1"] if patience is None else [])
    saves.leave_stuck_saves(7)
    assert left == ([] if patience is None else [7])
    assert any("is given up after 0.2 s" in line for line in log_lines) == (patience is not None)
    rank_is_back.set()
    checkpoints._saves._executor.shutdown()


def test_a_save_that_ends_in_time_is_kept_however_little_patience_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(saves, "_STUCK", [])
    checkpoints = checkpointer(tmp_path, async_mode="async")
    checkpoints.save(1, training_state(1), {"step": 1})
    checkpoints.close(30)
    assert names(tmp_path) == ["step-1"] and saves._STUCK == []


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 6000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (torch.OutOfMemoryError("the connection of a timeout"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("rows.parquet: connection reset by peer, read timed out"), False),
        (CheckpointError("lost contact with another rank: timeout"), False),
        (None, False),
    ],
)
def test_which_errors_tell_of_a_lost_rank(error, lost):
    assert job.is_of_a_lost_rank(error) is lost
