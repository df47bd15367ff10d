"""A storage that fails for a moment, and what counts as a checkpoint when old ones are removed."""

import errno
from pathlib import Path

import pytest

from tests.checkpoint.common import checkpointer, digest, load_once, names, save_steps, training_state
from torchtitan_rd.checkpoint import manifest as manifest_module
from torchtitan_rd.checkpoint import verify
from torchtitan_rd.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(manifest_module, "SECOND_LOOK_SECONDS", 0.0)


def failing_reads(monkeypatch, file: Path, times: int) -> list[int]:
    """The first `times` openings of `file` for reading get an EIO; returns a list that grows with each."""
    opened, failures = Path.open, []

    def open_or_fail(self, mode="r", *args, **kwargs):
        if self == file and "r" in mode and len(failures) < times:
            failures.append(1)
            raise OSError(errno.EIO, "Input/output error", str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_or_fail)
    return failures


FILES = ("__0_0.distcp", "manifest.json", "state.json", "config.toml", ".metadata")


@pytest.mark.parametrize("name", FILES)
def test_a_single_read_error_costs_no_checkpoint(tmp_path, monkeypatch, name):
    save_steps(tmp_path, [1, 2])
    failures = failing_reads(monkeypatch, tmp_path / "checkpoint" / "step-2" / name, 1)
    assert load_once(tmp_path) == ({"step": 2}, digest(training_state(2)))
    assert failures
    assert names(tmp_path) == ["step-1", "step-2"]


@pytest.mark.parametrize("name", FILES)
def test_what_stays_unreadable_is_passed_over_but_not_called_corrupt(tmp_path, monkeypatch, name, log_lines):
    """It is good again when the storage is, and only the next save replaces it."""
    save_steps(tmp_path, [1, 2])
    with monkeypatch.context() as patch:
        failing_reads(patch, tmp_path / "checkpoint" / "step-2" / name, 1000)
        assert load_once(tmp_path) == ({"step": 1}, digest(training_state(1)))
    assert names(tmp_path) == ["step-1", "step-2"]
    assert any(f"{name}: unreadable: Input/output error" in line for line in log_lines)
    assert load_once(tmp_path)[0] == {"step": 2}


def test_a_hash_that_differs_only_once_is_looked_at_again(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])
    sha256, calls = manifest_module._sha256, []

    def wrong_once(path):
        calls.append(path)
        return "0" * 64 if len(calls) == 1 else sha256(path)

    monkeypatch.setattr(manifest_module, "_sha256", wrong_once)
    assert load_once(tmp_path)[0] == {"step": 2}
    assert names(tmp_path) == ["step-1", "step-2"]


def test_an_error_after_the_verification_advises_what_helps(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])
    state = tmp_path / "checkpoint" / "step-2" / "state.json"
    good_until_read = verify

    def verified_and_then_lost(*args, **kwargs):
        problems = good_until_read(*args, **kwargs)
        failing_reads(monkeypatch, state, 1000)
        return problems

    monkeypatch.setattr("torchtitan_rd.checkpoint.checkpointer.verify", verified_and_then_lost)
    with pytest.raises(
        CheckpointError, match=r"run the same command again .* rename .*step-2 and an older"
    ) as raised:
        load_once(tmp_path)
    assert "verify_hashes" not in str(raised.value)


def test_a_checkpoint_that_lost_a_file_does_not_count_among_those_kept(tmp_path):
    """With two to keep, the damaged 20 must not push the good 10 out."""
    folder = tmp_path / "checkpoint"
    save_steps(tmp_path, [10, 20], keep_latest_k=2)
    (folder / "step-20" / "__0_0.distcp").unlink()
    save_steps(tmp_path, [30], keep_latest_k=2)
    assert names(tmp_path) == ["step-10", "step-20", "step-30"]
    save_steps(tmp_path, [40], keep_latest_k=2)
    assert names(tmp_path) == ["step-30", "step-40"], "damaged ones go with the good ones of their age"


@pytest.mark.parametrize("suffix", ["corrupt", "superseded"])
def test_only_the_last_three_that_were_set_aside_are_kept(tmp_path, suffix, log_lines):
    checkpoints = checkpointer(tmp_path, keep_latest_k=2)
    folder = checkpoints._folder
    for step in range(1, 8):
        checkpoints.save(step, training_state(step), {"step": step})
        folder.set_aside(f"step-{step}", suffix)
    (folder.root / f"step-1.{suffix}.mine").mkdir()
    checkpoints.save(8, training_state(8), {"step": 8})
    checkpoints.close()
    kept = [f"step-{step}.{suffix}" for step in (5, 6, 7)]
    assert names(tmp_path) == sorted([f"step-1.{suffix}.mine", *kept, "step-8"])
    assert any(f"step-4.{suffix}: the last 3 that were set aside are kept" in line for line in log_lines)


def test_an_export_of_an_abandoned_branch_does_not_pass_for_the_new_ones(tmp_path):
    save_steps(tmp_path, [1, 2])  # with its two exports, as many as are kept
    for name in ("step-2-model", "step-2-hf", "step-1-hf"):
        (tmp_path / "checkpoint" / name).mkdir()
    checkpoints = checkpointer(tmp_path, load_step=1)
    checkpoints.load(training_state(9))
    checkpoints.save(2, training_state(22), {"step": 2})
    checkpoints.close()
    left = names(tmp_path)
    assert "step-2-model.superseded" in left and "step-2-hf.superseded" in left and "step-1-hf" in left
