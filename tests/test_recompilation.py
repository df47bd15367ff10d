"""compile.fail_on_recompile: many depths and validations run on a few graphs,
and anything else stops the run.
"""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from tests.ranks import run_on_ranks
from tests.small_run import Setup, batches_of, make
from tests.test_read_outs import CPU, prepare
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.parallelism.compile import CompileConfig, _compiled_once_a_mode
from torchtitan_rd.validation import validate

COMPILE = {"enable": True, "backend": "eager", "fail_on_recompile": True}
DRAWS = [
    (0, 1),
    (5, 3),
    (0, 4),
    (2, 1),
    (7, 2),
    (1, 1),
    (9, 4),
    (3, 3),
    (4, 1),
    (0, 2),
    (6, 4),
    (8, 1),
    (2, 2),
    (1, 3),
]
CHECKPOINTING = {
    "none": {"mode": "none"},
    "full": {"mode": "full"},
    "op": {"mode": "selective", "selective_ac_option": "op"},
}


def many_draws(rank, world_size, ac, injection):
    """-> graphs compiled after 14 draws and three validations."""
    torch._dynamo.reset()
    counters.clear()
    sections = {"activation_checkpoint": CHECKPOINTING[ac], "compile": COMPILE}
    model, batches, draws = prepare(rank, world_size, {"injection": injection}, **sections)
    for number, num_steps in enumerate(DRAWS):
        extra = draws.training(number + 1, 0, batches[0]).kwargs | {"num_steps": num_steps}
        model(batches[0].inputs, **extra).square().mean().backward()
        if number % 6 == 0:
            validate(model, batches[:1], CPU, draws.validation([1, 4], batches))
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("world_size", "ac", "injection", "limit"),
    # Without injection the state needs a gradient or not, by the draw: two graphs more,
    # still below torch's limit of 8.
    [(1, "none", "linear", 4), (1, "op", "linear", 4), (2, "full", "linear", 4), (1, "full", "none", 6)],
)
def test_fourteen_draws_and_validations_are_served_by_a_few_graphs(world_size, ac, injection, limit):
    for graphs in run_on_ranks(world_size, many_draws, ac, injection):
        assert 2 <= graphs <= limit


def planted(rank, world_size, fails):
    """-> what a step says to microbatches that are shorter than those of the steps before."""
    torch._dynamo.reset()
    setup = Setup(sections={"compile": {**COMPILE, "fail_on_recompile": fails}})
    config, _, step = make(setup, world_size)
    for number in (1, 2, 3):
        step(number, batches_of(number, rank, world_size, config, padded=False))
    batches = batches_of(4, rank, world_size, config, padded=False)
    short = [replace(batch, inputs=batch.inputs[:, :-4], labels=batch.labels[:, :-4]) for batch in batches]
    try:
        return step(4, short).loss
    except TrainingError as error:
        return str(error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_new_shape_stops_the_run_with_the_block_and_the_guard(world_size):
    for message in run_on_ranks(world_size, planted, True):
        assert "compile.fail_on_recompile: layers.0 (Block.forward) would be compiled again" in message
        assert "size mismatch at index 1. expected 16, actual 12" in message
    assert all(isinstance(loss, float) for loss in run_on_ranks(world_size, planted, False))


def planted_in_validation(rank, world_size):
    torch._dynamo.reset()
    model, batches, draws = prepare(rank, world_size, compile=COMPILE)
    read_outs = draws.validation([1, 4], batches)
    validate(model, batches, CPU, read_outs)
    shorter = [replace(batch, inputs=batch.inputs[:, :-4], labels=batch.labels[:, :-4]) for batch in batches]
    inputs = {**read_outs.inputs(0), "initial_state": torch.zeros(2, 12, 32)}
    try:
        validate(model, shorter, CPU, read_outs._replace(inputs=lambda number: inputs))
    except TrainingError as error:
        return str(error)


def test_a_new_shape_in_validation_stops_it_too():
    message = run_on_ranks(1, planted_in_validation)[0]
    assert "transformer.prelude.0 (SandwichBlock.forward)" in message and "expected 16, actual 12" in message


def test_a_guard_without_compilation_is_refused():
    with pytest.raises(ValueError, match="fail_on_recompile needs enable = true"):
        CompileConfig(fail_on_recompile=True)


def test_other_errors_of_a_compiled_block_are_passed_on():
    outcomes = iter([torch.zeros(1), RuntimeError("out of memory")])

    def call(x):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    guarded = _compiled_once_a_mode(call, torch.nn.Identity(), "layers.0")
    guarded(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        guarded(torch.zeros(1))
