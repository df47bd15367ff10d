"""A save that fails says so on every rank, leaves nothing behind and takes nothing away."""

import errno
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from tests.checkpoint.forked import run_forked
from tests.ranks import run_on_ranks
from torchtitan_rd.checkpoint.folders import CheckpointFolder
from torchtitan_rd.errors import CheckpointError


def failing_body(rank, world_size, dump, mode, where):
    """Rank 1 alone has a full disk; returns the message that this rank gets, and when."""
    checkpoints = checkpointer(dump, async_mode=mode)
    write_data = FileSystemWriter.write_data

    def no_space(self, plan, planner):
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        return write_data(self, plan, planner)

    FileSystemWriter.write_data = no_space
    try:
        boundaries = 0
        checkpoints.save(3, training_state(3), {"step": 3})
        while where == "boundary":
            boundaries += 1
            time.sleep(0.01 * rank)
            saved = torch.tensor(float(checkpoints.has_saved()))  # as the train step sums it up
            dist.all_reduce(saved)
            if saved == world_size:
                checkpoints.wait()
        if where == "next save":
            checkpoints.save(4, training_state(4), {"step": 4})
        checkpoints.close()
    except CheckpointError as error:
        return str(error), boundaries
    finally:
        FileSystemWriter.write_data = write_data
        checkpoints.close()


@pytest.mark.parametrize("where", ["boundary", "next save", "close"])
def test_an_async_save_that_fails_on_one_rank_raises_on_all(tmp_path, where):
    save_steps(tmp_path, [2])
    results = run_on_ranks(2, failing_body, tmp_path, "async", where)
    assert None not in results
    (text, boundaries), (other_text, other_boundaries) = results
    assert boundaries == other_boundaries, "all ranks must stop at the same step"
    for message in (text, other_text):
        assert "step-3 was not saved" in message and "bytes are free there" in message
        assert "No space left on device" in message and str(tmp_path) in message
    assert names(tmp_path) == ["step-2"]
    assert load_once(tmp_path) == ({"step": 2}, digest(training_state(2)))


def test_a_synchronous_save_that_fails_on_one_rank_raises_at_once_on_all(tmp_path):
    save_steps(tmp_path, [2])
    results = run_on_ranks(2, failing_body, tmp_path, "disabled", "close")
    assert all("No space left on device" in message for message, _ in results)
    assert names(tmp_path) == ["step-2"]


def test_too_little_free_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = checkpointer(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    monkeypatch.setattr(CheckpointFolder, "new_staging", lambda *_: pytest.fail("it began to write"))
    with pytest.raises(CheckpointError) as raised:
        checkpoints.save(1, training_state(1), {"step": 1})
    needed = sum(t.numel() * 4 for group in training_state(1).values() for t in group.values())
    assert f"{tmp_path}/checkpoint: a checkpoint needs {needed:,} bytes and 10 are free" in str(raised.value)
    checkpoints.close()


def small_files_body(rank, world_size, dump):
    checkpoints = checkpointer(dump)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match="step-2 was not saved"):
        checkpoints.save(2, training_state(2), {"step": 2})
    checkpoints.close()


def test_a_real_write_error_of_the_operating_system_leaves_the_older_checkpoint(tmp_path):
    save_steps(tmp_path, [1])
    assert run_forked(1, small_files_body, tmp_path, store=tmp_path / "store") == [0]
    assert names(tmp_path) == ["step-1"]
    assert load_once(tmp_path) == ({"step": 1}, digest(training_state(1)))


def test_a_failure_of_the_commit_itself_removes_the_staging_folder(tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(self, target):
        if not self.is_dir():  # torch gives .metadata its name before
            return rename(self, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    save_steps(tmp_path, [1])
    monkeypatch.setattr(Path, "rename", refuse)
    checkpoints = checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"step-2 was not saved .*No space left on device"):
        checkpoints.save(2, training_state(2), {"step": 2})
    monkeypatch.undo()
    assert names(tmp_path) == ["step-1"]
    checkpoints.save(2, training_state(2), {"step": 2})  # the same run may go on
    checkpoints.close()
    assert load_once(tmp_path)[0] == {"step": 2}
