"""checkpoint.load_step and exclude_from_loading act once:
the same command again goes on from where it came to.
"""

import json

import pytest
import torch

from tests.checkpoint.common import checkpointer, digest, names, save_steps, training_state
from torchtitan_rd import train
from torchtitan_rd.errors import CheckpointError


def start(dump, steps, **config):
    """One start of a command: resumes, saves `steps` (seeded 100 + step), ends;
    returns the step it resumed from and the digest of what it loaded.
    """
    checkpoints = checkpointer(dump, **config)
    tensors = training_state(999)
    try:
        state = checkpoints.load(tensors)
        for step in steps:
            checkpoints.save(step, training_state(100 + step), {"step": step, "data": {"at": step}})
        return (state or {}).get("step"), digest(tensors)
    finally:
        checkpoints.close()


def test_load_step_goes_back_once_and_each_requeue_goes_on(tmp_path, log_lines):
    start(tmp_path, [10, 20, 30], keep_latest_k=2)
    same = {"load_step": 20, "keep_latest_k": 2}
    assert start(tmp_path, [], **same)[0] == 20  # died before its first save
    assert start(tmp_path, [25], **same)[0] == 20
    assert names(tmp_path) == ["step-20", "step-25", "step-30.superseded"]
    assert start(tmp_path, [30, 35], **same) == (25, digest(training_state(125)))
    assert start(tmp_path, [40], **same)[0] == 35, "step 20 itself is gone by now"
    assert names(tmp_path) == ["step-30.superseded", "step-35", "step-40"]
    assert any(
        "checkpoint.load_step = 20 has acted: steps [35, 30] branched from it" in line for line in log_lines
    )


def test_what_a_run_would_lose_does_not_count_the_steps_of_the_branch_it_left(tmp_path):
    start(tmp_path, [10, 20, 30], keep_latest_k=0)
    checkpoints = checkpointer(tmp_path, load_step=10, keep_latest_k=0)
    checkpoints.load(training_state(999))
    assert checkpoints.lost_at(15) == "the steps after 10 are lost"
    assert checkpoints.lost_at(10) == "nothing is lost"
    checkpoints.close()


def test_a_run_goes_back_in_its_midst_to_what_is_its_own(tmp_path):
    """Not to the steps of the branch that it has left, which stay until its first save."""
    start(tmp_path, [10, 20, 30], keep_latest_k=0)
    checkpoints = checkpointer(tmp_path, load_step=20, keep_latest_k=0)
    tensors = training_state(999)
    checkpoints.load(tensors)
    assert checkpoints.go_back(tensors, before=35)["step"] == 20
    assert digest(tensors) == digest(training_state(120))
    checkpoints.save(28, training_state(228), {"step": 28})
    assert [checkpoints.go_back(tensors, before=n)["step"] for n in (35, 28, 20)] == [28, 20, 10]
    checkpoints.close()


def test_a_run_that_has_excluded_something_does_not_go_back_to_before_it_had(tmp_path):
    start(tmp_path, [1])
    checkpoints = checkpointer(tmp_path, exclude_from_loading=["optimizer"])
    tensors = training_state(999)
    checkpoints.load(tensors)
    spoilt = training_state(666)
    assert checkpoints.go_back(spoilt, before=9) is None and digest(spoilt) == digest(training_state(666))
    checkpoints.save(2, tensors, {"step": 2})
    assert checkpoints.go_back(spoilt, before=9)["step"] == 2 and digest(spoilt) == digest(tensors)
    checkpoints.close()


def test_a_damaged_descendant_falls_back_to_the_one_before_it_and_then_to_the_step_named(tmp_path):
    start(tmp_path, [1, 2, 3])
    start(tmp_path, [2, 3], load_step=1)
    folder = tmp_path / "checkpoint"
    (folder / "step-3" / "__0_0.distcp").unlink()
    assert start(tmp_path, [], load_step=1)[0] == 2
    assert "step-3.corrupt" in names(tmp_path)
    (folder / "step-2" / "state.json").write_text("{}")
    assert start(tmp_path, [], load_step=1)[0] == 1


def test_a_folder_that_was_copied_in_part_is_not_in_the_way_of_a_run_that_goes_back(tmp_path):
    start(tmp_path, [10, 20, 30])
    for step in (20, 30):
        (tmp_path / "checkpoint" / f"step-{step}" / "manifest.json").unlink()
    assert start(tmp_path, [20, 25], load_step=10)[0] == 10
    assert names(tmp_path) == ["step-10", "step-20", "step-20.corrupt", "step-25", "step-30.corrupt"]
    assert start(tmp_path, [30], load_step=10)[0] == 25


def test_another_load_step_goes_back_again(tmp_path):
    start(tmp_path, [1, 2, 3, 4])
    start(tmp_path, [3, 4], load_step=2)
    assert start(tmp_path, [4, 5], load_step=3)[0] == 3
    assert start(tmp_path, [], load_step=2)[0] == 2, "steps 4 and 5 branched from 3, not from 2"
    assert start(tmp_path, [6])[0] == 5
    assert start(tmp_path, [], load_step=3)[0] == 3, "a run without load_step wrote the newest step"


def test_what_is_excluded_starts_afresh_once(tmp_path, log_lines):
    start(tmp_path, [1])
    same = {"exclude_from_loading": ["optimizer", "data", "model.output"]}
    tensors, expected = training_state(101), training_state(999)
    mixed = digest({"model": tensors["model"], "optimizer": expected["optimizer"]})
    assert start(tmp_path, [], **same) == (1, mixed)
    assert start(tmp_path, [2], **same) == (1, mixed), "nothing was saved in between"
    assert start(tmp_path, [3], **same) == (2, digest(training_state(102)))
    more = {"exclude_from_loading": ["optimizer", "model.output", "data", "step"]}
    step, loaded = start(tmp_path, [4], **more)
    assert step is None and loaded == digest(training_state(103)), "only the name that is new acts"
    assert start(tmp_path, [5])[0] == 4
    assert start(tmp_path, [], **same)[1] != digest(training_state(105)), "asked anew after a run without it"


def test_a_name_that_is_excluded_and_covers_nothing_is_still_an_error(tmp_path):
    start(tmp_path, [1])
    with pytest.raises(CheckpointError, match="'optimiser' names nothing"):
        start(tmp_path, [], exclude_from_loading=["optimiser"])


def test_the_disk_does_not_grow_with_the_number_of_times_a_run_goes_back(tmp_path):
    save_steps(tmp_path, [1, 2], keep_latest_k=2)
    for newest in range(2, 8):
        assert start(tmp_path, [newest], keep_latest_k=2, load_step=newest - 1)[0] == newest - 1
        assert start(tmp_path, [newest + 1], keep_latest_k=2)[0] == newest
    aside = [f"step-{step}.superseded" for step in (5, 6, 7)]
    assert names(tmp_path) == sorted([*aside, "step-7", "step-8"])


ARGUMENTS = [
    *("--training.seq_len=16", "--training.local_batch_size=1", "--training.mixed_precision_param=float32"),
    *("--model.overrides.dim=32", "--model.overrides.n_layers=1", "--comm.heartbeat_seconds=0"),
    *(
        "--checkpoint.enable",
        "--checkpoint.interval=1",
        "--checkpoint.keep_latest_k=2",
        "--metrics.log_freq=1",
    ),
]


def test_a_requeued_run_with_load_step_and_exclusions_goes_on(tmp_path, log_lines, monkeypatch):
    """The trainer itself: 3 steps; back to 2 with a fresh optimizer; the same command twice more."""
    monkeypatch.setattr(train, "init_logging", lambda *_: None)  # log_lines listens already

    def run(*more):
        log_lines.clear()
        assert train.main([*ARGUMENTS, f"--job.dump_folder={tmp_path}", *more]) == 0, log_lines
        return [line for line in log_lines if line.startswith(("resuming after", "not loading"))]

    assert run("--training.steps=3") == []
    same = ("--checkpoint.load_step=2", "--checkpoint.exclude_from_loading=optimizer")
    assert run("--training.steps=3", *same) == ["not loading optimizer: checkpoint.exclude_from_loading",
                                                "resuming after step 2 of 3 (32 tokens)"]  # fmt: skip
    assert run("--training.steps=5", *same) == ["resuming after step 3 of 5 (48 tokens)"]
    assert run("--training.steps=5", *same) == ["resuming after step 5 of 5 (80 tokens)"]
    assert names(tmp_path) == ["step-3.superseded", "step-4", "step-5"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert not torch.distributed.is_initialized()
