"""The watch for silent corruption: it names the rank, and leaves no trace in what it watches."""

import pytest
import torch

from tests.launch import rows
from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, hash_of, make
from torchtitan_rd import job, parts, train
from torchtitan_rd.errors import ClusterError
from torchtitan_rd.reliability.replay import ReplayKeys, checksum, replay

SMALL = [
    "--training.seq_len=16",
    "--training.local_batch_size=1",
    "--training.global_batch_size=2",
    "--training.mixed_precision_param=float32",
    "--training.steps=3",
    "--model.overrides.dim=32",
    "--model.overrides.n_layers=1",
    "--metrics.log_freq=1",
    "--comm.heartbeat_seconds=0",
]


@pytest.mark.parametrize("words", [torch.int16, torch.int32, torch.int64], ids=str)
def test_a_checksum_knows_every_bit_of_every_tensor(words):
    dtype = {torch.int16: torch.bfloat16, torch.int32: torch.float32, torch.int64: torch.float64}[words]
    tensor = torch.randn(5, 3).to(dtype).t()
    assert checksum([tensor, tensor]) == 2 * checksum([tensor]) == checksum([tensor.clone(), tensor])
    for bit in (0, 3, 14):
        other = tensor.contiguous().clone()
        other.view(words)[1, 2] ^= 1 << bit
        assert checksum([other, tensor]) != checksum([tensor, tensor])


def flip(tensor: torch.Tensor) -> None:
    """The lowest bit of one number."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    local.view(torch.int32).view(-1)[0] ^= 1


def replayed(rank, world_size, where):
    """What this rank is told of a microbatch that goes wrong on rank 1 when it is run again; and the weights
    after the step that follows, and after one without a replay.
    """
    config, model, step = make(Setup(), world_size)
    batches = batches_of(1, rank, world_size, config, padded=False)
    backward, calls, told = step._backward, [], None

    def wrong(*arguments):
        loss = backward(*arguments)
        calls.append(1)
        if len(calls) == 2 and rank == 1 and where != "nowhere":
            flip(loss if where == "loss" else next(model.parameters()).grad)
        return loss

    step._backward = wrong
    try:
        replay(lambda: step.rehearse(1, batches), job.gather, ReplayKeys(), step=1, gradients=True)
    except ClusterError as error:
        told = str(error)
    step._backward = backward
    step(1, batches)

    _, unwatched, plain_step = make(Setup(), world_size)
    plain_step(1, batches)
    return told, hash_of(model) == hash_of(unwatched)


@pytest.mark.parametrize("where", ["loss", "gradients", "nowhere"])
def test_the_rank_that_computes_wrongly_is_named_on_all_ranks_and_no_weight_knows_of_it(where):
    named = {
        "loss": "step 1: the loss of rank 1 had other bits",
        "gradients": "the gradients that rank 1 holds",
    }
    for told, is_untouched in run_on_ranks(2, replayed, where):
        assert is_untouched
        assert told is None if where == "nowhere" else named[where] in told


def test_gradients_that_do_not_repeat_on_a_device_are_not_compared_there():
    found = iter([(1, 2), (1, 3)])
    replay(lambda: next(found), lambda own: [own], ReplayKeys(), step=1, gradients=False)
    found = iter([(1, 2), (1, 3)])
    with pytest.raises(ClusterError, match="gradients that rank 0 holds"):
        replay(lambda: next(found), lambda own: [own], ReplayKeys(), step=1, gradients=True)


def test_a_run_replays_every_nth_step_and_ends_at_a_difference_or_goes_on(tmp_path, monkeypatch, capfd):
    every_second = "--training.replay_interval=2"
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path / 'plain'}"]) == 0
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path / 'watched'}", every_second]) == 0
    plain, watched = (rows(tmp_path / name) for name in ("plain", "watched"))
    assert [row["loss_hex"] for row in plain] == [row["loss_hex"] for row in watched]
    assert ["replay_seconds" in row for row in watched] == [False, True, False]

    rehearse, seen = parts.TrainStep.rehearse, []

    def wrong(self, step, batches):
        seen.append(step)
        loss, gradients = rehearse(self, step, batches)
        return loss, gradients + len(seen)

    monkeypatch.setattr(parts.TrainStep, "rehearse", wrong)
    folder = f"--job.dump_folder={tmp_path / 'wrong'}"
    assert train.main([*SMALL, folder, every_second, "--training.on_replay_mismatch=warn"]) == 0
    assert seen == [2, 2] and "step 2: the gradients that rank 0 holds" in capfd.readouterr().err
    assert [row["loss_hex"] for row in rows(tmp_path / "wrong")] == [row["loss_hex"] for row in plain]
    assert train.main([*SMALL, f"--job.dump_folder={tmp_path / 'ends'}", every_second]) == 1
    assert "ClusterError: step 2: the gradients" in capfd.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "ends")] == [1]
