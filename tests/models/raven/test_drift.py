"""How far bfloat16 is from float32 after some training: no farther than the autocast that trained Huginn."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.drift import (
    BF16,
    CONFIG,
    FP32,
    batch_of,
    core_gradient,
    errors,
    loss_of,
    plain,
    sharded,
    trained,
)
from tests.ranks import run_on_ranks

SMALL = replace(CONFIG, dim=64, n_heads=2, ffn_dim=160, n_layers_prelude=1, n_layers_core=2, n_layers_coda=1)
DRAWS, DEEP = [(4, 4), (24, 8)], (0, 24)
LIMIT = 1.15  # times the error of autocast


def measured(rank: int, world_size: int) -> dict[str, dict[tuple[int, int], tuple[float, float]]]:
    """Errors of logits and of the core's gradient, by run and draw."""
    weights = trained(SMALL, 25)

    def under_autocast(draw: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, state = batch_of(SMALL, seed)
        weights.zero_grad()
        with torch.autocast("cpu", dtype=BF16):
            logits = weights(tokens, num_steps=draw, initial_state=state)
        loss_of(logits, tokens).backward()
        return logits.detach(), core_gradient(weights)

    runs = {
        "autocast": (under_autocast, DRAWS),
        "default": (sharded(weights), [*DRAWS, DEEP]),
        "all in bfloat16": (sharded(weights, state_dtype=BF16, full_precision=False), DRAWS),
        "summed in float32": (sharded(weights, loop_grad_dtype=FP32), [DEEP]),
    }
    reference = cache(plain(weights))
    return {
        name: {draw: errors(run, reference, draw, batches=6) for draw in draws}
        for name, (run, draws) in runs.items()
    }


@pytest.fixture(scope="module")
def found():
    return run_on_ranks(1, measured)[0]


@pytest.mark.parametrize("draw", DRAWS)
def test_the_default_is_as_close_to_float32_as_autocast_of_the_same_weights(draw, found):
    for ours, autocast in zip(found["default"][draw], found["autocast"][draw], strict=True):
        assert 0 < ours <= LIMIT * autocast


@pytest.mark.parametrize("draw", DRAWS)
def test_norms_and_state_in_bfloat16_would_not_be(draw, found):
    for coarse, autocast in zip(found["all in bfloat16"][draw], found["autocast"][draw], strict=True):
        assert coarse > 1.5 * autocast


def test_a_core_gradient_summed_in_float32_is_closer_over_many_iterations(found):
    (coarse_logits, coarse), (fine_logits, fine) = found["default"][DEEP], found["summed in float32"][DEEP]
    assert fine_logits == coarse_logits, "it is a matter of backward alone"
    assert fine < 0.8 * coarse
