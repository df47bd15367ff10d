"""What a plan says a GPU takes is what a run takes, where both can be had: on CPUs."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

from tests.planning.common import LLAMA, RAVEN, allocated, config_of, planned, run_for_real
from tests.ranks import run_on_ranks
from torchtitan_rd.parallelism.tiled_mlp import swiglu
from torchtitan_rd.planning import trace
from torchtitan_rd.planning.tracker import Tracker

NONE, SELECTIVE, FULL = {"mode": "none"}, {"mode": "selective"}, {"mode": "full"}
BY_OP = {"mode": "selective", "selective_ac_option": "op"}
ATTENTION = {"mode": "full", "keep": "attention"}
EVERY_SECOND = {**ATTENTION, "keep_every": 2}
OFFLOADED = {"mode": "full", "offload": True}
BLOCKS = {"mode": "full", "recurrent_region": "block"}
TILES, CHUNKS = {"mlp_tile_tokens": 64}, {"loss_chunk_tokens": 64}


def deeper(model: dict) -> dict:
    more = {"n_layers": 8} if model is LLAMA else {"mean_recurrence": 9, "mean_backprop_depth": 6}
    return {**model, "overrides": {**model["overrides"], **more}}


def case(model: dict, recompute: dict, training: dict | None = None):
    return config_of(model, activation_checkpoint=recompute, training=training or {})


def compare(configs: list, world_size: int) -> None:
    """Shards to the byte; what else the step takes within 10 %."""
    real = run_on_ranks(world_size, run_for_real, configs, timeout=900.0)[0]
    for config, seen in zip(configs, real, strict=True):
        # On a CPU, host memory is the device's too: offloaded inputs count while they live there.
        with patch.object(trace, "_marks_host_memory", lambda tracker: nullcontext()):
            plan = planned(config, world_size)
        assert (plan.parameters, plan.optimizer) == (seen["parameters"], seen["optimizer"])
        assert plan.gradients == seen["gradients"]
        need = plan.worst
        told = need.peak - plan.parameters - plan.optimizer
        assert told == pytest.approx(seen["peak"], rel=0.1), (config.activation_checkpoint, need.parts)


@pytest.mark.slow
def test_two_ranks_take_what_was_planned():
    compare([case(LLAMA, FULL), case(RAVEN, NONE)], world_size=2)


def test_a_step_takes_what_was_planned():
    muon = config_of(
        deeper(RAVEN), activation_checkpoint=ATTENTION, training=CHUNKS, optimizer={"name": "Muon"}
    )
    compare([case(deeper(LLAMA), SELECTIVE, TILES), muon], world_size=1)


@pytest.mark.parametrize("tile_tokens", [64, 256])
def test_a_feed_forward_in_tiles_takes_to_the_byte_what_is_planned(tile_tokens):
    """Alone and wide: in a whole step of a small model something else is at work when most is taken."""

    def work() -> None:
        shapes = [(512, 8), (256, 8), (256, 8), (8, 256)]
        x, gate, up, down = (torch.ones(shape, requires_grad=True) for shape in shapes)
        swiglu(x, [gate, up], down, tile_tokens).sum().backward()

    with Tracker() as tracker:
        work()
    assert tracker.peak.bytes == allocated(work)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("model", [LLAMA, RAVEN, deeper(LLAMA), deeper(RAVEN)])
def test_every_technique_takes_what_was_planned(model, world_size):
    recomputations = [NONE, SELECTIVE, BY_OP, FULL, ATTENTION, EVERY_SECOND, OFFLOADED, BLOCKS]
    configs = [case(model, recompute) for recompute in recomputations]
    configs += [case(model, FULL, training) for training in (TILES, CHUNKS, {**TILES, **CHUNKS})]
    configs += [case(model, NONE, {"global_batch_size": 4 * world_size})]
    configs += [case(model, FULL, {"mixed_precision_param": "bfloat16"})]
    compare(configs, world_size)


SHARED = {
    "2 of context": (2, {"context_parallel_degree": 2}),
    "2 of matrices": (2, {"tensor_parallel_degree": 2}),
    "4 of context": (4, {"context_parallel_degree": 4}),
    "2 of context x 2 of matrices": (4, {"context_parallel_degree": 2, "tensor_parallel_degree": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("model", [LLAMA, RAVEN], ids=["llama", "raven"])
def test_ranks_that_share_rows_take_what_was_planned(model, layout):
    world_size, degrees = SHARED[layout]
    recomputations = [NONE, FULL, ATTENTION, OFFLOADED]
    configs = [config_of(model, activation_checkpoint=one, parallelism=degrees) for one in recomputations]
    tiled = {**TILES, **CHUNKS}
    configs.append(config_of(model, activation_checkpoint=FULL, parallelism=degrees, training=tiled))
    compare(configs, world_size)
