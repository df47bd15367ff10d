"""One update: exact under padding and accumulation, and never taken from a number that is not finite."""

import hashlib

import pytest
import torch

from tests.ranks import run_on_ranks
from tests.small_run import Setup, all_equal, batches_of, hash_of, make, train
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.train_step import hash_ids


@pytest.mark.parametrize(("world_size", "local_batch_size"), [(1, 8), (1, 2), (2, 4), (2, 1)])
def test_uneven_padding_weighs_every_valid_token_alike(world_size, local_batch_size):
    """Against the mean over all valid tokens of the global batch, by plain autograd on
    the unsharded model.
    """
    setup = Setup(sections={"training": {"local_batch_size": local_batch_size}}, steps=1, padded=True)
    loss, gradients = run_on_ranks(1, reference, setup)[0]
    for result in run_on_ranks(world_size, train, setup):
        assert result["losses"][0] == pytest.approx(loss, abs=1e-6)
        scale = min(1.0, 1.0 / result["norms"][0])  # the step clips at norm 1
        for name, gradient in gradients.items():
            torch.testing.assert_close(result["gradients"][name], gradient * scale, atol=1e-6, rtol=1e-4)


def reference(rank, world_size, setup):
    whole = Setup(steps=1, padded=True)
    config, model, _ = make(whole, 1)
    batch = batches_of(1, 0, 1, config, padded=True)[0]
    logits = model(batch.inputs)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
    loss.backward()
    return loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_accumulation_trains_as_one_large_microbatch_does(world_size):
    whole = run_on_ranks(1, train, Setup())[0]
    for result in run_on_ranks(world_size, train, Setup(sections={"training": {"local_batch_size": 1}})):
        assert result["losses"] == pytest.approx(whole["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(whole["norms"], abs=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nonfinite_number_on_the_last_rank_stops_all_ranks_before_the_update(world_size, where):
    assert run_on_ranks(world_size, poisoned, "stop", where) == [True] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nonfinite_step_is_skipped_on_all_ranks_and_training_goes_on(world_size):
    assert run_on_ranks(world_size, poisoned, "skip", "gradient") == [True] * world_size


def poisoned(rank, world_size, policy, where):
    setup = Setup(sections={"training": {"on_nonfinite": policy, "max_consecutive_skips": 1}})
    config, model, step = make(setup, world_size)
    before = hash_of(model)
    step(1, batches_of(1, rank, world_size, config, padded=False))
    after_one = hash_of(model)
    poison = rank == world_size - 1
    target = model.output if where == "loss" else model.layers[0]

    def to_nan(module, inputs, output):
        return output * float("nan") if poison else output

    def grad_to_nan(module, grad_input, grad_output):
        return tuple(g * float("nan") if poison and g is not None else g for g in grad_input)

    hook = (
        target.register_forward_hook(to_nan)
        if where == "loss"
        else target.register_full_backward_hook(grad_to_nan)
    )
    batches = batches_of(2, rank, world_size, config, padded=False)
    if policy == "stop":
        with pytest.raises(TrainingError, match=r"step 2: .*nan.*stopped before the update"):
            step(2, batches)
        hook.remove()
        return before != after_one and hash_of(model) == after_one and all_equal(after_one)
    result = step(2, batches)
    assert hash_of(model) == after_one and result.grad_norm != result.grad_norm
    poison = False
    result = step(3, batches)
    after_three = hash_of(model)
    assert result.grad_norm == result.grad_norm and after_three != after_one
    assert result.numbers.consecutive_skips == 0
    poison = rank == world_size - 1
    step(4, batches)
    with pytest.raises(TrainingError, match="allows 1 skipped updates in a row"):
        step(5, batches)
    hook.remove()
    return hash_of(model) == after_three


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_data_hash_is_that_of_the_rows_in_global_order(world_size):
    ids = run_on_ranks(1, global_ids)[0]
    expected = hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
    assert run_on_ranks(world_size, hashed)[0] == expected


def hashed(rank, world_size):
    config, _, _ = make(Setup(sections={"training": {"local_batch_size": 1}}), world_size)
    return hash_ids(batches_of(1, rank, world_size, config, padded=False))


def global_ids(rank, world_size):
    config, _, _ = make(Setup(), 1)
    return batches_of(1, 0, 1, config, padded=False)[0].inputs
