"""What is saved comes back bit for bit, on any number of ranks."""

import json
import threading
import time

import pytest
import torch

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from tests.ranks import run_on_ranks
from torchtitan_rd.checkpoint import SafeReader, read_manifest, verify
from torchtitan_rd.checkpoint.writer import Writer
from torchtitan_rd.errors import CheckpointError, ConfigError

STATE = {
    "step": 3,
    "tokens_seen": 2**60 + 1,
    "loss": 0.1 + 0.2,
    "rng": [1, 2],
    "data": {"epoch": 0, "offset": 17},
}


def save_body(rank, world_size, dump, mode):
    checkpoints = checkpointer(dump, async_mode=mode)
    tensors = training_state(3)
    checkpoints.save(3, tensors, STATE)
    expected = digest(tensors)
    for tensor in tensors["model"].values():
        tensor.mul_(2.0)  # a save in flight must not see it
    checkpoints.close()
    return expected


def load_body(rank, world_size, dump):
    checkpoints = checkpointer(dump)
    tensors = training_state(999)
    state = checkpoints.load(tensors)
    checkpoints.close()
    return state, digest(tensors)


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize(("savers", "loaders"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_state_is_restored_bit_for_bit_on_any_number_of_ranks(tmp_path, savers, loaders, mode):
    expected = run_on_ranks(savers, save_body, tmp_path, mode)[0]
    assert verify(tmp_path / "checkpoint" / "step-3") == []
    assert run_on_ranks(loaders, load_body, tmp_path) == [(STATE, expected)] * loaders


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_without_a_process_group_the_same_folder_is_written_and_read(tmp_path, mode):
    expected = save_body(0, 1, tmp_path, mode)
    assert load_body(0, 1, tmp_path) == (STATE, expected)
    assert run_on_ranks(2, load_body, tmp_path) == [(STATE, expected)] * 2


def test_parameters_may_change_while_an_async_save_has_not_begun_to_write(tmp_path, monkeypatch):
    gate, write = threading.Event(), Writer._write_shards

    def wait_then_write(self, snapshot, staging):
        assert gate.wait(30)
        return write(self, snapshot, staging)

    monkeypatch.setattr(Writer, "_write_shards", wait_then_write)
    checkpoints = checkpointer(tmp_path, async_mode="async")
    tensors = training_state(1)
    expected = digest(tensors)
    checkpoints.save(1, tensors, {"step": 1})
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    assert not checkpoints.has_saved()
    assert not any(name.startswith("step-") for name in names(tmp_path))
    gate.set()
    checkpoints.close()
    assert load_once(tmp_path) == ({"step": 1}, expected)


def test_the_folder_holds_what_docs_say_under_the_names_of_the_ancestors(tmp_path):
    run_on_ranks(2, save_body, tmp_path, "disabled")
    step = tmp_path / "checkpoint" / "step-3"
    assert sorted(p.name for p in step.iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp",
        "config.toml", "manifest.json", "model.json", "state.json",
    ]  # fmt: skip
    manifest = read_manifest(step)
    assert sorted(manifest.files) == sorted(p.name for p in step.iterdir() if p.name != "manifest.json")
    assert (manifest.step, manifest.resumable, manifest.world_size) == (3, True, 2)
    assert manifest.tensors["model.output.weight"].model_dump() == {"shape": [5, 4], "dtype": "float32"}
    assert set(SafeReader(step).tensors()) == set(manifest.tensors)
    assert json.loads((step / "state.json").read_text()) == STATE
    assert "extra" not in (step / "config.toml").read_text()  # a key without a value


def test_without_any_checkpoint_there_is_nothing_to_resume(tmp_path):
    assert load_once(tmp_path)[0] is None


def test_disabled_checkpoints_write_nothing_and_load_nothing(tmp_path):
    checkpoints = checkpointer(tmp_path, enable=False)
    assert not checkpoints.should_save(1, last_step=True)
    assert checkpoints.load(training_state(1)) is None
    assert checkpoints.load_initial(training_state(1)["model"]) is None
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_saving_is_due_at_every_interval_and_at_the_last_step(tmp_path):
    checkpoints = checkpointer(tmp_path, interval=3)
    assert [s for s in range(1, 9) if checkpoints.should_save(s, last_step=s == 8)] == [3, 6, 8]
    checkpoints.close()


def seconds_body(rank, world_size, dump):
    checkpoints = checkpointer(dump, interval=3600, interval_type="seconds")
    early = checkpoints.should_save(1, last_step=False)
    checkpoints._last_save = time.monotonic() - (7200 if rank == 0 else 0)  # the clocks of the ranks differ
    due = checkpoints.should_save(2, last_step=False)
    checkpoints.save(2, training_state(2), {"step": 2})
    again = checkpoints.should_save(3, last_step=False)
    last = checkpoints.should_save(4, last_step=True)
    checkpoints.close()
    return early, due, again, last


def test_in_seconds_mode_the_clock_of_rank_0_decides_for_all(tmp_path):
    assert run_on_ranks(2, seconds_body, tmp_path) == [(False, True, False, True)] * 2


def test_a_step_that_is_saved_already_is_not_written_again(tmp_path):
    checkpoints = checkpointer(tmp_path)
    checkpoints.save(1, training_state(1), {"step": 1})
    before = (tmp_path / "checkpoint" / "step-1").stat().st_ino
    checkpoints.save(1, training_state(1), {"step": 1}, last_step=True)
    assert (tmp_path / "checkpoint" / "step-1").stat().st_ino == before
    checkpoints.close()
    resumed = checkpointer(tmp_path)
    resumed.load(training_state(2))
    resumed.save(1, training_state(1), {"step": 1})  # as after a signal right after the resume
    resumed.close()
    assert names(tmp_path) == ["step-1"]


def test_close_is_idempotent_and_may_follow_a_failed_save(tmp_path):
    checkpoints = checkpointer(tmp_path)
    with pytest.raises(TypeError):
        checkpoints.save(1, training_state(1), {"step": object()})
    checkpoints.close()
    checkpoints.close()
    assert names(tmp_path) == []


def test_the_last_save_may_hold_only_the_model_in_another_type_and_is_not_resumed_from(tmp_path):
    save_steps(tmp_path, [1])
    checkpoints = checkpointer(tmp_path, last_save_model_only=True, export_dtype="bfloat16")
    checkpoints.save(2, training_state(2), {"step": 2}, last_step=True)
    checkpoints.close()
    assert names(tmp_path) == ["step-1", "step-2-model"]
    export = tmp_path / "checkpoint" / "step-2-model"
    assert verify(export) == [] and not read_manifest(export).resumable
    tensors = SafeReader(export).tensors()
    assert {key.partition(".")[0] for key in tensors} == {"model"}
    assert {info.dtype for info in tensors.values()} == {torch.bfloat16}
    assert load_once(tmp_path)[0] == {"step": 1}
    export.rename(export.with_name("step-2"))
    with pytest.raises(
        CheckpointError, match=r"step-2 holds only the model: name it in checkpoint\.initial_load_path"
    ):
        load_once(tmp_path)


def test_pinned_staging_without_cuda_is_an_error_that_names_the_other_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match='async_with_pinned_mem" needs CUDA; use "async" here'):
        checkpointer(tmp_path, async_mode="async_with_pinned_mem")


@pytest.mark.gpu
def test_pinned_staging_copies_cuda_tensors_before_it_returns(tmp_path):
    checkpoints = checkpointer(tmp_path, async_mode="async_with_pinned_mem")
    for step in (1, 2):  # the second save reuses the buffers of the first
        tensors = {
            group: {k: t.cuda() for k, t in members.items()}
            for group, members in training_state(step).items()
        }
        checkpoints.save(step, tensors, {"step": step})
        for tensor in tensors["model"].values():
            tensor.zero_()
    checkpoints.close()
    assert load_once(tmp_path) == ({"step": 2}, digest(training_state(2)))
