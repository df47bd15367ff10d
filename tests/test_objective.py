"""The keys of the objective through the step that a user runs, against plain autograd on the whole batch."""

import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_on_ranks
from tests.small_run import SEQ_LEN, Setup, batches_of, make, train
from tests.test_precision import build, full, sections
from torchtitan_rd.model_spec import ForwardInputs
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.train_step import TrainStep

CPU = torch.device("cpu")
UNCLIPPED = 1e6
OBJECTIVE = {
    "z_loss_weight": 0.05,
    "goldfish_strategy": "static",
    "goldfish_k": 3,
    "goldfish_start_position": 1,
    "max_norm": UNCLIPPED,
}


@pytest.mark.parametrize(("world_size", "local_batch_size"), [(1, 8), (2, 2)])
def test_z_loss_and_goldfish_act_in_the_step_as_in_their_formulas(world_size, local_batch_size):
    """The reported loss is the cross entropy of the labels that are left, without the z-loss."""
    loss, gradients = run_on_ranks(1, with_z_loss_and_goldfish)[0]
    training = {**OBJECTIVE, "local_batch_size": local_batch_size}
    setup = Setup(sections={"training": training}, steps=1, padded=True)
    for result in run_on_ranks(world_size, train, setup):
        assert result["losses"][0] == pytest.approx(loss, abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-6, rtol=1e-4)


def with_z_loss_and_goldfish(rank, world_size):
    config, model, _ = make(Setup(), 1)
    (batch,) = batches_of(1, 0, 1, config, padded=True)
    kept = batch.labels != -100
    kept[:, 1::3] = False
    logits = model(batch.inputs)[kept]
    loss = F.cross_entropy(logits, batch.labels[kept])
    (loss + 0.05 * logits.logsumexp(-1).square().mean()).backward()
    return loss.item(), {name: p.grad.full_tensor() for name, p in model.named_parameters()}


DRAWS = [(1, 3), (2, 1), (2, 0), (0, 2)]  # of four microbatches


@pytest.mark.parametrize("throttle", [False, True])
def test_throttle_divides_each_microbatch_by_its_iterations_with_gradient(throttle):
    losses, found, expected = run_on_ranks(1, throttled, throttle)[0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6), "what is reported is not divided"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def throttled(rank, world_size, throttle):
    """-> (loss of the step, plain loss), gradients of the step, and those by plain autograd."""
    training = {"local_batch_size": 2, "throttle": throttle, "max_norm": UNCLIPPED}
    config, _, _, model = build(Setup(sections=sections("float32", training=training)), world_size)
    state = torch.randn(2, SEQ_LEN, 32, generator=torch.Generator().manual_seed(5))
    parameters = dict(model.named_parameters())

    batches = batches_of(1, rank, world_size, config, padded=True)
    valid = sum(int((batch.labels != -100).sum()) for batch in batches)
    total = 0.0
    for draw, batch in zip(DRAWS, batches, strict=True):
        logits = model(batch.inputs, num_steps=draw, initial_state=state).flatten(0, 1)
        loss = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100, reduction="sum") / valid
        total += loss.item()
        (loss / (max(draw[1], 1) if throttle else 1)).backward()
    expected = {name: full(p.grad) for name, p in parameters.items()}

    def inputs(step, number, batch):
        return ForwardInputs({"num_steps": DRAWS[number], "initial_state": state}, DRAWS[number])

    step = TrainStep(
        model, build_optimizer(model, config.optimizer), config.training, CPU, forward_inputs=inputs
    )
    result = step(1, batches)
    return (result.loss, total), {name: full(p.grad) for name, p in parameters.items()}, expected
