"""What is kept, what is removed, and what is never touched."""

import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from torchtitan_rd.checkpoint import CheckpointConfig, verify
from torchtitan_rd.checkpoint.folders import CheckpointFolder


def test_the_newest_k_are_kept_with_the_seed_and_everything_that_is_the_users(tmp_path):
    folder = tmp_path / "checkpoint"
    save_steps(tmp_path, [0, 1])
    (folder / "step-1").rename(tmp_path / "far")
    (folder / "step-1").symlink_to(tmp_path / "far")
    for name in ("foo", "step-9x", "step-007", ".tmp-mine", "step-4.bak"):
        (folder / name).mkdir()
    (folder / "step-3").write_text("a file")
    save_steps(tmp_path, [5, 6, 7, 8], keep_latest_k=2)
    expected = [
        ".tmp-mine",
        "foo",
        "step-0",
        "step-007",
        "step-1",
        "step-3",
        "step-4.bak",
        "step-7",
        "step-8",
        "step-9x",
    ]
    assert names(tmp_path) == expected
    assert verify(tmp_path / "far") == []


def test_zero_keeps_all_and_one_is_refused(tmp_path):
    save_steps(tmp_path, range(1, 6), keep_latest_k=0)
    assert len(names(tmp_path)) == 5
    with pytest.raises(ValidationError, match="no older checkpoint to fall back to"):
        CheckpointConfig(keep_latest_k=1)


def test_a_verified_checkpoint_exists_at_every_instant_of_many_async_saves(tmp_path):
    save_steps(tmp_path, [1])
    folder, stop, empty_moments, looks = tmp_path / "checkpoint", threading.Event(), [], []

    def look():
        while not stop.is_set():
            looks.append(0)
            if not any(verify(folder / f"step-{step}") == [] for step in CheckpointFolder(folder).steps()):
                empty_moments.append(sorted(p.name for p in folder.iterdir()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        save_steps(tmp_path, range(2, 32), keep_latest_k=2, async_mode="async")
    finally:
        stop.set()
        watcher.join()
    assert len(looks) > 30 and empty_moments == []
    assert names(tmp_path) == ["step-30", "step-31"]


def test_what_a_dead_run_left_is_removed_at_the_next_start(tmp_path):
    save_steps(tmp_path, [1])
    for name in (f".tmp-step-2-{'a' * 32}", f".trash-step-1-{'b' * 32}", f".tmp-step-3-model-{'c' * 32}"):
        (tmp_path / "checkpoint" / name).mkdir()
    load_once(tmp_path)
    assert names(tmp_path) == ["step-1"]


def test_going_back_sets_the_abandoned_branch_aside_at_the_next_save(tmp_path, log_lines):
    save_steps(tmp_path, [1, 2, 3])
    checkpoints = checkpointer(tmp_path, load_step=1, keep_latest_k=2)
    checkpoints.load(training_state(9))
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]  # loading alone changes nothing
    checkpoints.save(2, training_state(22), {"step": 2})
    checkpoints.close()
    assert names(tmp_path) == ["step-1", "step-2", "step-2.superseded", "step-3.superseded"]
    assert load_once(tmp_path) == ({"step": 2}, digest(training_state(22)))
    assert any("step-3 is of an earlier run that this one replaces" in line for line in log_lines)


def test_a_users_file_in_the_way_of_a_checkpoint_is_an_error_and_stays(tmp_path):
    checkpoints = checkpointer(tmp_path)
    (tmp_path / "checkpoint" / "step-1").mkdir()
    with pytest.raises(Exception, match="is in the way and is not a checkpoint; move it"):
        checkpoints.save(1, training_state(1), {"step": 1})
    checkpoints.close()
    assert names(tmp_path) == ["step-1"] and list((tmp_path / "checkpoint" / "step-1").iterdir()) == []


@pytest.mark.parametrize("folder", ["../x", "/tmp/x", "a/../../x", "", ".", "a\nb"])
def test_a_folder_outside_the_dump_folder_is_refused(folder):
    with pytest.raises(ValidationError, match="must name a folder inside"):
        CheckpointConfig(folder=folder)


def test_a_folder_may_be_nested(tmp_path):
    save_steps(tmp_path, [1], folder="runs/a")
    assert (Path(tmp_path) / "runs" / "a" / "step-1" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "keys", [{"load_step": 0}, {"load_step": 5}, {"create_seed_checkpoint": True}, {"interval": 0}]
)
def test_settings_that_make_no_sense_are_refused(keys):
    with pytest.raises(ValidationError):
        CheckpointConfig(**keys)
