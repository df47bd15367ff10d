"""Validation at several depths: one forward to the deepest passes all of them, and reads each out once."""

import weakref
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.raven.tiny import tiny_config
from tests.models.tiny import some_tokens, tiny_llama
from tests.ranks import run_on_ranks
from tests.small_run import SEQ_LEN, VOCAB, Setup, batches_of, config_of
from torchtitan_rd.build_model import build_model
from torchtitan_rd.data import BatchDims
from torchtitan_rd.draws import Draws
from torchtitan_rd.models import get_spec
from torchtitan_rd.models.raven.inputs import VALIDATION_STEP, initial_state
from torchtitan_rd.parallelism import ParallelDims
from torchtitan_rd.validation import ValidationConfig, validate

CPU = torch.device("cpu")
DEPTHS = [16, 1, 4, 6]  # the mean of the tiny shape is 6, which is asked for twice thereby
DISTINCT = 4
MICROBATCH = 2


def prepare(rank, world_size, fields=None, **sections):
    """-> (sharded raven, this rank's held-out batches, the run's draws)."""
    setup = Setup(sections={"training": {"local_batch_size": MICROBATCH}, **sections})
    config, spec = config_of(setup, world_size), get_spec("raven")
    shape = tiny_config(vocab_size=VOCAB, **(fields or {}))
    mesh = ParallelDims.resolve(config.parallelism, world_size).build_mesh("cpu")
    model = build_model(config, spec, shape, mesh, CPU)
    draws = Draws(
        spec,
        shape,
        config.recurrence,
        BatchDims.resolve(config.training, rank, world_size),
        seed=7,
        total_steps=10,
        seq_len=SEQ_LEN,
        device=CPU,
        dtype=torch.float32,
    )
    return model, batches_of(3, rank, world_size, config, padded=True), draws


@torch.no_grad()
def separately(model, batches, rank, depth):
    """The loss from a forward of its own for each batch, from the model's own arguments."""
    sums = torch.zeros(2, dtype=torch.float64)
    for number, batch in enumerate(batches):
        first = (rank * len(batches) + number) * MICROBATCH
        state = initial_state(
            model.shape,
            seed=7,
            step=VALIDATION_STEP,
            samples=range(first, first + MICROBATCH),
            seq_len=SEQ_LEN,
            device=CPU,
            dtype=torch.float32,
        )
        logits = model(batch.inputs, num_steps=(depth, 0), initial_state=state)
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
        )
        sums += torch.stack([loss.double(), (batch.labels != -100).sum().double()])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def one_pass_and_separate_ones(rank, world_size, fields):
    model, batches, draws = prepare(rank, world_size, fields)
    found = validate(model, batches, CPU, draws.validation(DEPTHS, batches))
    depths = {"val_loss": 6, **{f"val_loss_{depth}": depth for depth in DEPTHS}}
    return found, {name: separately(model, batches, rank, depth) for name, depth in depths.items()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"injection": "none"}])
def test_one_pass_gives_bit_for_bit_the_losses_of_separate_forwards(world_size, fields):
    for found, expected in run_on_ranks(world_size, one_pass_and_separate_ones, fields):
        assert found == expected and list(found) == ["val_loss", *(f"val_loss_{depth}" for depth in DEPTHS)]
        assert found["val_loss"] == found["val_loss_6"]
        assert len(set(found.values())) == DISTINCT, "each depth has a loss of its own"


class CountGathers(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in ("allgather", "allreduce"):
            self.counts[kind] += kind in func.__name__
        return func(*args, **(kwargs or {}))


def count(rank, world_size):
    """-> calls of the parts in one validation, and its collectives."""
    model, batches, draws = prepare(rank, world_size)
    layers, counts = model.transformer, Counter()
    parts = {
        "prelude": layers.prelude[0],
        "loop": layers.recurrence,
        "iteration": layers.recurrence.iteration,
        "coda": layers.coda[0],
        "head": model.lm_head,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda module, inputs, name=name: counts.update([name]))
    with CountGathers() as collectives:
        validate(model, batches, CPU, draws.validation(DEPTHS, batches))
    return len(batches), counts | collectives.counts


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_prelude_runs_once_and_the_core_as_often_as_the_deepest_needs(world_size):
    for batches, counts in run_on_ranks(world_size, count):
        assert batches == 4 // world_size
        assert counts["prelude"] == counts["loop"] == batches
        assert counts["iteration"] == 16 * batches, "not 16 + 1 + 4 + 6 + 6"
        assert counts["coda"] == counts["head"] == DISTINCT * batches
        # The prelude once a batch, the coda once a read-out;
        # root (with the tied head) and loop stay gathered.
        assert counts["allgather"] == (2 + (1 + DISTINCT) * batches if world_size > 1 else 0)
        assert counts["allreduce"] == 1


def logits_alive(rank, world_size):
    """-> for each read-out, how many sets of logits, its own included, were in memory."""
    model, batches, draws = prepare(rank, world_size)
    seen, alive = [], []

    def read_out(logits):
        seen.append(weakref.ref(logits))
        alive.append(sum(ref() is not None for ref in seen))
        return logits.sum()

    with torch.no_grad():
        model(batches[0].inputs, read_out=read_out, **draws.validation(DEPTHS, batches).inputs(0))
    return alive


def test_one_set_of_logits_is_in_memory_at_a_time():
    assert run_on_ranks(1, logits_alive) == [[1] * DISTINCT]


def validated_amid_steps(rank, world_size, depths):
    """-> the gradients of a step after a validation at `depths`, or after none."""
    model, batches, draws = prepare(rank, world_size)
    parameters = list(model.parameters())  # as an optimizer holds them
    for validating in (False, True):
        for parameter in parameters:
            parameter.grad = None
        if validating and depths:
            validate(model, batches, CPU, draws.validation(depths, batches))
        extra = draws.training(1, 0, batches[0])
        model(batches[0].inputs, **extra.kwargs).square().mean().backward()
    return model.training, [p.grad.full_tensor() for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_read_outs_leave_training_bit_for_bit_as_it_was(world_size):
    with_validation = run_on_ranks(world_size, validated_amid_steps, DEPTHS)
    without = run_on_ranks(world_size, validated_amid_steps, [])
    for (training, found), (_, expected) in zip(with_validation, without, strict=True):
        assert training and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert any(gradient.any() for gradient in found)


def test_the_default_depths_beside_a_mean_of_32_are_six_read_outs():
    depths = ValidationConfig().partial_depth_eval
    found = run_on_ranks(1, default_read_outs, depths)[0]
    assert found == (
        {"val_loss": 4, **{f"val_loss_{d}": i for i, d in enumerate(depths)}},
        (64, 0),
        tuple(depths[:-1]),
    )


def default_read_outs(rank, world_size, depths):
    _, batches, draws = prepare(rank, world_size, {"mean_recurrence": 32})
    read_outs = draws.validation(depths, batches)
    kwargs = read_outs.inputs(0)
    return read_outs.position, kwargs["num_steps"], kwargs["early_read_outs"]


def test_a_model_without_recurrence_has_one_read_out_of_the_same_logits():
    model, tokens = tiny_llama(), some_tokens()
    assert torch.equal(*model(tokens, read_out=partial(torch.mul, other=2)), 2 * model(tokens))
