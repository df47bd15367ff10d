"""What stands between a save and its loss: storage before the rename, rank 0 that looks,
a trainer that listens.
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.common import checkpointer, names, save_steps, training_state
from tests.ranks import run_on_ranks
from torchtitan_rd import train
from torchtitan_rd.checkpoint.writer import Writer
from torchtitan_rd.errors import CheckpointError
from torchtitan_rd.train_step import TrainStep


def test_every_file_and_folder_is_forced_to_storage_before_the_rename_and_the_new_name_after_it(
    tmp_path, monkeypatch
):
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor):
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def recorded_rename(source, target, **keys):
        events.append(("rename", str(target)))
        rename(source, target, **keys)

    checkpoints = checkpointer(tmp_path)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    checkpoints.save(1, training_state(1), {"step": 1})
    monkeypatch.undo()
    checkpoints.close()
    step = tmp_path / "checkpoint" / "step-1"
    committed = events.index(("rename", str(step)))
    before = [Path(path) for kind, path in events[:committed] if kind == "fsync"]
    (staging,) = {path.parent for path in before if path.parent != step.parent}
    forced = {path.name.removesuffix(".tmp") for path in before if path.parent == staging}
    assert forced == {path.name for path in step.iterdir()}
    assert staging in before
    assert ("fsync", str(step.parent)) in events[committed + 1 :]


def unseen_body(rank, world_size, dump, damage):
    """Rank 1 writes where rank 0 does not see it, or sees something else."""
    checkpoints = checkpointer(dump)
    hash_own_files = Writer._hash_own_files

    def hidden(self, staging):
        table = hash_own_files(self, staging)
        if rank == 1:
            shard = staging / "__1_0.distcp"
            shard.write_bytes(shard.read_bytes()[:-1]) if damage == "cut" else shard.unlink()
        return table

    Writer._hash_own_files = hidden
    try:
        with pytest.raises(
            CheckpointError, match=r"rank 0 does not see .*__1_0\.distcp: the folder must be shared"
        ):
            checkpoints.save(2, training_state(2), {"step": 2})
    finally:
        Writer._hash_own_files = hash_own_files
        checkpoints.close()
    return True


@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_a_shard_that_rank_0_does_not_see_is_not_committed(tmp_path, damage):
    save_steps(tmp_path, [1])
    assert run_on_ranks(2, unseen_body, tmp_path, damage) == [True, True]
    assert names(tmp_path) == ["step-1"]


ARGUMENTS = [
    *("--training.seq_len=16", "--training.local_batch_size=1", "--training.mixed_precision_param=float32"),
    *(
        "--model.overrides.dim=32",
        "--model.overrides.n_layers=1",
        "--comm.heartbeat_seconds=0",
        "--checkpoint.enable",
    ),
]


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(tmp_path, monkeypatch):
    """Python's, NumPy's and torch's generators, each used once a step, go on where the
    checkpoint left them.
    """
    call, draws = TrainStep.__call__, []

    def drawing(self, *arguments):
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return call(self, *arguments)

    def drawn(folder, *steps):
        draws.clear()
        for last in steps:
            assert (
                train.main([*ARGUMENTS, f"--job.dump_folder={tmp_path / folder}", f"--training.steps={last}"])
                == 0
            )
        return list(draws)

    monkeypatch.setattr(TrainStep, "__call__", drawing)
    whole = drawn("whole", 4)
    assert len(set(whole)) == 4
    assert drawn("in two parts", 2, 4) == whole


def test_a_failed_background_save_ends_the_run_long_before_the_next_one(tmp_path, monkeypatch, capfd):
    def failing(self, snapshot):
        raise CheckpointError("the storage is gone")

    monkeypatch.setattr(Writer, "write", failing)
    keys = ["--checkpoint.async_mode=async", "--checkpoint.interval=10", "--training.steps=20"]
    assert train.main([*ARGUMENTS, *keys, f"--job.dump_folder={tmp_path}"]) == 1
    assert "the storage is gone" in capfd.readouterr().err
    assert 11 <= json.loads((tmp_path / "exit_status.json").read_text())["step"] < 20
