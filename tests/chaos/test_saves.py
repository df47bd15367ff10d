"""Saves that are slow, killed or fail at once: rows 7, 25 and 31 of docs/reliability.md."""

import errno
import os
import random
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemWriter

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from tests.checkpoint.forked import CRASHED, crash, run_forked
from torchtitan_rd.checkpoint import verify
from torchtitan_rd.checkpoint.folders import CheckpointFolder
from torchtitan_rd.checkpoint.manifest import Manifest
from torchtitan_rd.errors import CheckpointError


def late_body(rank, world_size, dump):
    """Goes back to step 1 and saves another step 2; rank 1 is killed before it writes its part."""
    checkpoints = checkpointer(dump, load_step=1)
    checkpoints.load(training_state(9))
    if rank == 1:
        FileSystemWriter.write_data = lambda *_: (time.sleep(1.0), crash())
    checkpoints.save(2, training_state(22), {"step": 2})
    checkpoints.close()


@pytest.mark.slow
def test_a_late_rank_that_is_killed_leaves_the_save_of_the_same_name_whole(tmp_path):
    save_steps(tmp_path, [1, 2])
    assert run_forked(2, late_body, tmp_path, store=tmp_path / "store") == [1, CRASHED]
    assert verify(tmp_path / "checkpoint" / "step-2") == []
    assert load_once(tmp_path) == ({"step": 2}, digest(training_state(2)))
    assert names(tmp_path) == ["step-1", "step-2"]


def save_on(dump: Path, last: int) -> None:
    """Resumes if it can, then saves up to `last`, each save longer than it would be."""
    checkpoints = checkpointer(dump, keep_latest_k=2, async_mode="async")
    state = checkpoints.load(training_state(0))
    write_data = FileSystemWriter.write_data
    FileSystemWriter.write_data = lambda *arguments: (time.sleep(0.01), write_data(*arguments))[1]
    for step in range(state["step"] + 1 if state else 1, last + 1):
        checkpoints.save(step, training_state(step), {"step": step})
    checkpoints.close()
    os._exit(0)


@pytest.mark.slow
def test_over_50_slow_saves_with_kills_a_verified_checkpoint_exists_at_every_look(tmp_path):
    """A look each 10 ms, also while nobody lives; five times kill -9."""
    rng, context = random.Random(25), get_context("fork")
    folder, kills, looks, seen = tmp_path / "checkpoint", 5, 0, False
    while True:
        process = context.Process(target=save_on, args=(tmp_path, 50))
        process.start()
        killed_at = time.monotonic() + (rng.uniform(0.05, 0.4) if kills else 60)
        while process.is_alive():
            good = folder.is_dir() and any(
                verify(folder / f"step-{step}") == [] for step in CheckpointFolder(folder).steps()
            )
            assert good or not seen, names(tmp_path)
            looks, seen = looks + 1, seen or good
            if time.monotonic() > killed_at:
                process.kill()
                process.join()
            time.sleep(0.01)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills -= 1
    assert kills == 0 and looks > 50
    assert load_once(tmp_path) == ({"step": 50}, digest(training_state(50)))
    assert names(tmp_path) == ["step-49", "step-50"]


def fails_once(monkeypatch, owner, name: str, number: int) -> list[int]:
    """The first call of `owner.name` fails with an error of the operating system; -> a list of the calls."""
    original, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        if owner is Path and not arguments[0].is_dir():  # .metadata, which torch renames
            return original(*arguments, **options)
        calls.append(1)
        if len(calls) == 1:
            raise OSError(number, os.strerror(number))
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [
        (os, "fsync", errno.EIO),
        (Manifest, "write", errno.ENOSPC),
        (Path, "rename", errno.ENOSPC),
        (FileSystemWriter, "finish", errno.EIO),
    ],
)
def test_storage_that_fails_once_fails_that_save_alone(tmp_path, monkeypatch, owner, name, number):
    save_steps(tmp_path, [1])
    checkpoints = checkpointer(tmp_path)
    assert fails_once(monkeypatch, owner, name, number) == []
    with pytest.raises(CheckpointError, match=f"step-2 was not saved .*{os.strerror(number)}"):
        checkpoints.save(2, training_state(2), {"step": 2})
    assert names(tmp_path) == ["step-1"]
    checkpoints.save(2, training_state(2), {"step": 2})
    checkpoints.close()
    assert load_once(tmp_path) == ({"step": 2}, digest(training_state(2)))


def test_a_slow_fsync_delays_an_asynchronous_save_and_nothing_else(tmp_path, monkeypatch):
    fsync = os.fsync
    checkpoints = checkpointer(tmp_path, async_mode="async")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(0.1), fsync(descriptor))[1])
    started = time.monotonic()
    checkpoints.save(1, training_state(1), {"step": 1})
    returned = time.monotonic() - started
    assert not checkpoints.has_saved() and names(tmp_path) != ["step-1"]
    checkpoints.close()
    assert time.monotonic() - started > 0.5 > returned, "several files and folders are forced to storage"
    assert load_once(tmp_path) == ({"step": 1}, digest(training_state(1)))
