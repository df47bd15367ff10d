"""Batches that are passed over, as asked or after a spike of the loss: all others stay what they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.launch import rows
from tests.ranks import run_on_ranks
from torchtitan_rd import parts, train
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.metrics import StepResult
from torchtitan_rd.reliability.rollback import Rollbacks, SpikeKeys, SpikeWatch

SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.global_batch_size=4",
    "--training.mixed_precision_param=float32",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--metrics.log_freq=1",
    "--metrics.log_data_hash",
    "--comm.heartbeat_seconds=0",
]
ON_SPIKES = [
    "--checkpoint.enable",
    "--checkpoint.interval=2",
    "--training.on_spike=rollback",
    "--training.spike_window=3",
]


def start(folder: Path, *arguments: str) -> int:
    """A run in this process, which in its own would end with this code."""
    code = train.main([*SMALL, f"--job.dump_folder={folder}", *arguments])
    if dist.is_initialized():  # as a run that has failed leaves it
        dist.destroy_process_group()
    return code


def column(folder: Path, name: str) -> list:
    """Of metrics.jsonl. A row says its batch once it may differ from its step."""
    return [row[name] if name != "batch" else row.get(name, row["step"]) for row in rows(folder)]


# ---- passing over


@pytest.mark.parametrize("ramp", [[], ["--training.batch_ramp_steps=6", "--training.batch_ramp_stages=2"]])
def test_what_is_passed_over_is_left_out_and_all_else_stays(ramp, tmp_path):
    arguments = [*ramp, "--training.steps=9"]
    assert start(tmp_path / "whole", *arguments) == 0
    left_out = "--training.skip_batches=[[3,4],[6,6],[1,1]]"
    assert start(tmp_path / "less", *ramp, "--training.steps=5", left_out) == 0
    assert column(tmp_path / "less", "batch") == [2, 5, 7, 8, 9]
    hashes = column(tmp_path / "whole", "data_hash")
    assert column(tmp_path / "less", "data_hash") == [hashes[n - 1] for n in (2, 5, 7, 8, 9)]
    tokens = [0, *column(tmp_path / "whole", "tokens_seen")]
    sizes = [tokens[n] - tokens[n - 1] for n in (2, 5, 7, 8, 9)]
    assert column(tmp_path / "less", "tokens_seen")[-1] == sum(sizes)


def test_a_run_that_resumes_within_what_it_passes_over_goes_on_as_one_that_did_not_stop(tmp_path, capfd):
    arguments = ["--training.skip_batches=[[3,4]]", "--checkpoint.enable"]
    assert start(tmp_path / "whole", *arguments, "--training.steps=6") == 0
    for steps in (2, 3, 6):
        assert start(tmp_path / "parts", *arguments, f"--training.steps={steps}") == 0
    for name in ("loss_hex", "data_hash", "batch", "tokens_seen"):
        assert column(tmp_path / "whole", name) == column(tmp_path / "parts", name), name
    assert "passed over batches 3 to 4" in capfd.readouterr().err


def test_a_checkpoint_from_before_batches_were_counted_stands_at_its_step(tmp_path, monkeypatch):
    from torchtitan_rd import run_state

    state_of = run_state.state_of

    def older(*arguments):
        state = state_of(*arguments)
        del state["data"]["batch"]
        return state

    assert start(tmp_path / "whole", "--training.steps=4") == 0
    monkeypatch.setattr(run_state, "state_of", older)
    assert start(tmp_path / "parts", "--training.steps=2", "--checkpoint.enable") == 0
    monkeypatch.undo()
    left_out = "--training.skip_batches=[[3,3]]"
    assert start(tmp_path / "parts", "--training.steps=3", "--checkpoint.enable", left_out) == 0
    hashes = column(tmp_path / "whole", "data_hash")
    assert column(tmp_path / "parts", "data_hash") == [hashes[0], hashes[1], hashes[3]]


@pytest.mark.parametrize("value", ["[[0,1]]", "[[4,3]]", "[[1]]"])
def test_ranges_that_are_none_are_refused(value, tmp_path, capfd):
    assert start(tmp_path, f"--training.skip_batches={value}") == 1
    assert "[training] skip_batches" in capfd.readouterr().err and not (tmp_path / "metrics.jsonl").exists()


# ---- spikes


def watched(losses: list[float], **keys) -> list[int]:
    """The numbers (from 0) of the losses that are spikes."""
    watch = SpikeWatch(SpikeKeys(**keys))
    found = []
    for number, loss in enumerate(losses):
        watch.began(number, batch=number)
        if watch.judge(number, loss, seen_at=number):
            found.append(number)
    return found


def test_a_spike_is_what_lies_far_above_the_window_and_is_not_taken_into_it():
    usual = [2.0, 2.1, 1.9, 2.05, 1.95]
    keys = {"spike_window": 5, "spike_deviations": 10.0}
    # median 2.0, median absolute deviation 0.05: the bound is 2 + 10 * 1.4826 * 0.05 = 2.7413
    assert watched([*usual, 2.741, 2.0], **keys) == []
    assert watched([*usual, 2.742, 9.0, 2.0], **keys) == [5, 6]
    assert watched([9.0, *usual[:3], 9.0], **keys) == [], "of a window that is not full yet"
    # A loss that does not move: 1 % of it is its deviation.
    assert watched([2.0] * 5 + [2.19, 2.21], **keys) == [6]
    # The fourth would be usual in a window that had taken the three before it.
    assert watched([2.0] * 5 + [3.0] * 4, **keys) == [5, 6, 7, 8]
    assert watched([*usual, float("nan"), 2.0], **keys) == []


def spiking(monkeypatch, bad_batches, late=False):
    """Runs in this process report a loss of 1000 for these batches, whatever their step."""
    call, init, next_batch = parts.TrainStep.__call__, parts.TrainStep.__init__, parts.BatchQueue.next
    now = {}

    def counted(self):
        found = next_batch(self)
        now["batch"] = self.number
        return found

    def reported(self, step, *arguments):
        result, batch = call(self, step, *arguments), now["batch"]

        def read():
            numbers = result.numbers
            return replace(numbers, loss=1000.0) if batch in bad_batches else numbers

        return StepResult(step, read, depths=result.depths, tokens_seen=result.tokens_seen)

    def made(self, *arguments, **options):
        init(self, *arguments, **{**options, "late": late or None})

    monkeypatch.setattr(parts.BatchQueue, "next", counted)
    monkeypatch.setattr(parts.TrainStep, "__call__", reported)
    monkeypatch.setattr(parts.TrainStep, "__init__", made)


@pytest.mark.parametrize("late", [False, True])
def test_after_a_spike_a_run_is_one_that_never_saw_those_batches(late, tmp_path, monkeypatch, capfd):
    """Spikes at the step of batch 7, which is step 7; where numbers come late it is noticed in step 8."""
    outputs, begin = [], parts.Metrics.start

    def started(self, step, tokens_seen, **how):
        outputs.append((step, how.get("differs", False)))
        begin(self, step, tokens_seen, **how)

    with monkeypatch.context() as patch:
        spiking(patch, {7}, late)
        patch.setattr(parts.Metrics, "start", started)
        assert start(tmp_path / "run", *ON_SPIKES, "--training.steps=10") == 0
    assert outputs == [(0, False), (4, True)], "a tracker must not take the rows for those it has"
    last = 8 if late else 7
    error = capfd.readouterr().err
    assert "step 7: the loss is 1000.0000, where" in error
    assert f"went back to step 4 (rollback 1 of 3); batches 6 to {last} are passed over" in error

    assert start(tmp_path / "clean", f"--training.skip_batches=[[6,{last}]]", "--training.steps=10") == 0
    for name in ("step", "loss_hex", "data_hash", "batch", "tokens_seen", "lr"):
        found, wanted = column(tmp_path / "run", name)[4:], column(tmp_path / "clean", name)[4:]
        assert found == wanted, name
    names = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    assert "step-6.superseded" in names and "step-10" in names
    [told] = json.loads((tmp_path / "run" / "rollbacks.json").read_text())
    assert (told["step"], told["to_step"], told["batches"]) == (7, 4, [6, last])


def test_a_run_that_dies_as_it_goes_back_cannot_return_to_what_it_left(tmp_path, monkeypatch):
    def die(*_):
        raise RuntimeError("as a kill would")

    spiking(monkeypatch, {7})
    monkeypatch.setattr(Rollbacks, "add", die)
    assert start(tmp_path, *ON_SPIKES, "--training.steps=10") == 1
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert {"step-4", "step-6.superseded"} <= names and "step-6" not in names


def test_a_restart_passes_over_what_a_rollback_did_and_a_new_run_does_not(tmp_path, monkeypatch):
    spiking(monkeypatch, {5})
    go_on = [*ON_SPIKES, "--checkpoint.interval=1"]
    assert start(tmp_path, *go_on, "--training.steps=4") == 0
    made = [{"batches": [6, 7]}]  # of a run that was killed right after it had gone back to step 4
    (tmp_path / "rollbacks.json").write_text(json.dumps(made))
    assert start(tmp_path, *go_on, "--training.steps=6") == 0
    assert column(tmp_path, "batch")[4:] == [5, 8]

    for path in (tmp_path / "checkpoint").iterdir():
        path.rename(tmp_path / path.name)
    assert start(tmp_path, "--training.steps=6") == 0
    assert "batch" not in rows(tmp_path)[0] and not (tmp_path / "rollbacks.json").exists()
    assert json.loads((tmp_path / "rollbacks.previous.json").read_text()) == made


def test_one_spike_too_many_stops_the_run(tmp_path, monkeypatch, capfd):
    spiking(monkeypatch, {5, 8, 11})
    arguments = [*ON_SPIKES, "--checkpoint.interval=1", "--training.max_rollbacks=2", "--training.steps=20"]
    assert start(tmp_path, *arguments) == 1
    error = capfd.readouterr().err
    assert "rollback 2 of 2" in error and "training.max_rollbacks = 2 rollbacks have been made" in error
    assert len(json.loads((tmp_path / "rollbacks.json").read_text())) == 2


def test_without_a_checkpoint_from_before_a_spike_is_only_warned_of(tmp_path, monkeypatch, capfd):
    spiking(monkeypatch, {5})
    assert start(tmp_path, *ON_SPIKES, "--checkpoint.interval=100", "--training.steps=6") == 0
    assert "there is no checkpoint from before to go back to" in capfd.readouterr().err
    assert column(tmp_path, "step") == [1, 2, 3, 4, 5, 6] and not (tmp_path / "rollbacks.json").exists()


def test_going_back_needs_checkpoints(tmp_path, capfd):
    assert start(tmp_path, "--training.on_spike=rollback") == 1
    assert "set checkpoint.enable = true" in capfd.readouterr().err


def test_two_ranks_go_back_together(tmp_path):
    assert run_on_ranks(2, go_back_on_ranks, str(tmp_path)) == [0, 0]
    assert column(tmp_path, "batch") == [1, 2, 3, 6, 7]
    assert len(json.loads((tmp_path / "rollbacks.json").read_text())) == 1


def go_back_on_ranks(rank, world_size, folder):
    """The harness's process group is the run's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.job, "init_process_group", lambda *_: None)
        patch.setattr(train.dist, "destroy_process_group", lambda *_: None)
        spiking(patch, {5})
        arguments = [*ON_SPIKES, "--checkpoint.interval=1", "--checkpoint.async_mode=async"]
        return train.main([*SMALL, f"--job.dump_folder={folder}", *arguments, "--training.steps=5"])


def test_a_list_of_rollbacks_that_cannot_be_read_is_said_and_not_forgotten(tmp_path):
    (tmp_path / "rollbacks.json").write_text("[{")
    with pytest.raises(TrainingError, match=r"rollbacks.json cannot be read"):
        Rollbacks(tmp_path, SpikeKeys(), writes=True).read(is_new_run=False)
