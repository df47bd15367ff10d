"""Every damage is seen; a run falls back to an older checkpoint, or stops and says why."""

import random
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from tests.ranks import run_on_ranks
from torchtitan_rd.checkpoint import verify
from torchtitan_rd.commands import verify as verify_command
from torchtitan_rd.errors import CheckpointError


def test_each_of_200_random_bit_flips_in_any_file_is_detected(tmp_path):
    save_steps(tmp_path, [1])
    step = tmp_path / "checkpoint" / "step-1"
    files = sorted(step.iterdir())
    rng = random.Random(0)
    for trial in range(200):
        file = files[trial % len(files)]
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        assert verify(step), f"trial {trial} in {file.name}"
        file.write_bytes(good)
    assert verify(step) == []


def flip(step: Path) -> None:
    shard = step / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)


def truncate(step: Path) -> None:
    shard = step / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])


def zero_page(step: Path) -> None:
    shard = step / "__0_0.distcp"
    content = shard.read_bytes()
    shard.write_bytes(bytes(4096) + content[4096:])


DAMAGES = {
    "bit flip": flip,
    "truncated": truncate,
    "zero page": zero_page,
    "missing shard": lambda step: (step / "__0_0.distcp").unlink(),
    "missing metadata": lambda step: (step / ".metadata").unlink(),
    "missing manifest": lambda step: (step / "manifest.json").unlink(),
    "missing state": lambda step: (step / "state.json").unlink(),
    "empty shard": lambda step: (step / "__0_0.distcp").write_bytes(b""),
    "empty manifest": lambda step: (step / "manifest.json").write_bytes(b""),
    "shard of another step": lambda step: shutil.copy(step.with_name("step-1") / "__0_0.distcp", step),
    "whole other step": lambda step: (shutil.rmtree(step), shutil.copytree(step.with_name("step-1"), step)),
    "empty folder": lambda step: (shutil.rmtree(step), step.mkdir()),
    "symlinked shard": lambda step: (
        (step / "__0_0.distcp").rename(step / "real"),
        (step / "__0_0.distcp").symlink_to(step / "real"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_set_aside_for_the_older_one(tmp_path, log_lines, damage):
    save_steps(tmp_path, [1, 2])
    DAMAGES[damage](tmp_path / "checkpoint" / "step-2")
    assert load_once(tmp_path) == ({"step": 1}, digest(training_state(1)))
    assert names(tmp_path) == ["step-1", "step-2.corrupt"]
    assert any("step-2 is damaged" in line for line in log_lines)


def test_the_log_names_the_damaged_file_with_both_hashes(tmp_path, log_lines):
    save_steps(tmp_path, [1, 2])
    flip(tmp_path / "checkpoint" / "step-2")
    problem = verify(tmp_path / "checkpoint" / "step-2")[0]
    assert "__0_0.distcp: sha256 is " in problem and "manifest.json says " in problem
    load_once(tmp_path)
    assert any(problem in line for line in log_lines)


def fall_back_body(rank, world_size, dump):
    checkpoints = checkpointer(dump)
    for step in (1, 2):
        checkpoints.save(step, training_state(step), {"step": step})
    if rank == 1:
        shard = Path(dump) / "checkpoint" / "step-2" / "__1_0.distcp"
        shard.write_bytes(shard.read_bytes()[:-8] + bytes(8))
    dist.barrier()
    tensors = training_state(9)
    state = checkpoints.load(tensors)
    checkpoints.close()
    return state, digest(tensors) == digest(training_state(1))


def test_all_ranks_fall_back_to_the_same_checkpoint(tmp_path):
    assert run_on_ranks(2, fall_back_body, tmp_path) == [({"step": 1}, True)] * 2


def test_with_all_checkpoints_damaged_the_run_stops_and_nothing_is_changed(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        truncate(tmp_path / "checkpoint" / f"step-{step}")
    for _ in range(2):  # the same when the same command runs again
        with pytest.raises(CheckpointError) as raised:
            load_once(tmp_path)
        assert "step-1: __0_0.distcp: has" in str(raised.value) and "step-2: __0_0.distcp: has" in str(
            raised.value
        )
        assert names(tmp_path) == ["step-1", "step-2"]


def test_a_folder_with_only_quarantined_checkpoints_does_not_start_from_scratch(tmp_path):
    save_steps(tmp_path, [1])
    (tmp_path / "checkpoint" / "step-1").rename(tmp_path / "checkpoint" / "step-1.corrupt")
    with pytest.raises(CheckpointError, match=r"holds only damaged checkpoints \(step-1\.corrupt\)"):
        load_once(tmp_path)


def test_a_symlinked_checkpoint_is_refused_and_left_where_it_is(tmp_path):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoint"
    (folder / "step-2").rename(tmp_path / "elsewhere")
    (folder / "step-2").symlink_to(tmp_path / "elsewhere")
    assert load_once(tmp_path)[0] == {"step": 1}
    assert (folder / "step-2").is_symlink() and (tmp_path / "elsewhere").is_dir()


def test_load_step_names_one_step_without_any_fallback(tmp_path, log_lines):
    save_steps(tmp_path, [1, 2, 3])
    assert load_once(tmp_path, load_step=2) == ({"step": 2}, digest(training_state(2)))
    assert any("going back to step 2" in line for line in log_lines)
    with pytest.raises(CheckpointError, match=r"load_step = 7: .* has the steps \[3, 2, 1\]"):
        load_once(tmp_path, load_step=7)
    flip(tmp_path / "checkpoint" / "step-2")
    with pytest.raises(CheckpointError, match=r"step-2: __0_0.distcp: sha256 is"):
        load_once(tmp_path, load_step=2)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]


def test_without_hashes_sizes_are_still_compared(tmp_path):
    save_steps(tmp_path, [1, 2])
    truncate(tmp_path / "checkpoint" / "step-2")
    assert load_once(tmp_path, verify_hashes=False)[0] == {"step": 1}


def test_the_verify_command_prints_each_damaged_file_and_returns_1(tmp_path, capsys):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoint"
    assert verify_command.main([str(folder)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["ok", "ok"]
    flip(folder / "step-2")
    assert verify_command.main([str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"ok {folder / 'step-1'}")
    assert lines[1].startswith(f"DAMAGED {folder / 'step-2'}: __0_0.distcp: sha256 is")
    assert verify_command.main([str(folder / "step-2")]) == 1
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify_command.main([str(folder / "nothing")])
