"""models/raven/inputs.py: depth and first state are functions of the step and the sample,
never of the ranks.
"""

import math
from dataclasses import replace

import pytest
import torch

from tests.models.raven.tiny import tiny_config
from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import Microbatch
from torchtitan_rd.models.raven.inputs import RavenInputs, initial_state
from torchtitan_rd.models.raven.recurrence import RecurrenceConfig
from torchtitan_rd.models.raven.shape import STATE_INITS

CPU = torch.device("cpu")
WHOLE = Microbatch(step=3, count=3, rank=0, samples=range(8), seq_len=10, device=CPU, dtype=torch.float32)


def inputs(seed: int = 0, **keys) -> RavenInputs:
    return RavenInputs(tiny_config(), RecurrenceConfig(**keys), seed=seed, total_steps=100)


def state(microbatch: Microbatch = WHOLE, **keys) -> torch.Tensor:
    return inputs(**keys)(microbatch).kwargs["initial_state"]


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (1, 4), (2, 2), (8, 1)])
def test_a_row_has_the_same_noise_and_depth_for_any_ranks_and_accumulation(ranks, accumulation):
    size = 8 // ranks // accumulation
    parts = [
        inputs()(replace(WHOLE, rank=r, count=3 * accumulation + a, samples=range(first, first + size)))
        for r in range(ranks)
        for a in range(accumulation)
        for first in [(r * accumulation + a) * size]
    ]
    assert torch.equal(torch.cat([part.kwargs["initial_state"] for part in parts]), state())
    assert {part.num_steps for part in parts} == {part.kwargs["num_steps"] for part in parts}
    assert {part.num_steps for part in parts} == {inputs()(WHOLE).num_steps}


def test_noise_differs_by_seed_step_and_sample_and_repeats():
    rows = [state(), state(replace(WHOLE, step=4)), state(seed=1)]
    flat = torch.cat(rows).flatten(1)
    assert len({tuple(row.tolist()) for row in flat}) == 24
    assert torch.equal(state(), rows[0])


def test_drawing_touches_no_global_generator():
    before = torch.random.get_rng_state()
    inputs()(WHOLE)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", STATE_INITS)
def test_each_state_init_has_its_distribution(kind):
    config = tiny_config(state_init=kind, dim=64)
    drawn = initial_state(
        config, seed=0, step=1, samples=[0, 7], seq_len=2000, device=CPU, dtype=torch.float32
    )
    spread = {
        "like-init": math.sqrt(0.4) * 0.98658,
        "normal": 1,
        "embed": 1 / 8,
        "zero": 0,
        "unit": math.sqrt(63 / 64),
    }
    assert float(drawn.std(unbiased=False)) == pytest.approx(spread[kind], rel=0.01)
    assert abs(float(drawn.mean())) < 0.01
    if kind == "like-init":
        assert 2.9 < float(drawn.abs().max()) / math.sqrt(0.4) <= 3.0
    if kind == "unit":
        assert drawn.mean(-1).abs().max() < 1e-6
        assert torch.allclose(drawn.std(-1), torch.ones(2, 2000), atol=1e-5)


def test_like_init_has_no_embedding_scale_where_embeddings_have_none():
    config = tiny_config(init_strategy="scaled", dim=64)
    drawn = initial_state(config, seed=0, step=1, samples=[0], seq_len=2000, device=CPU, dtype=torch.float32)
    assert float(drawn.std()) == pytest.approx(config.weight_std * 0.98658, rel=0.01)


def test_the_first_state_is_float32_unless_it_shall_be_of_the_type_of_the_parameters():
    in_bfloat16 = replace(WHOLE, dtype=torch.bfloat16)
    assert torch.equal(state(in_bfloat16), state())
    assert torch.equal(state(in_bfloat16, state_dtype="as_param"), state().bfloat16())
    for keys, dtype in (({}, torch.float32), ({"state_dtype": "as_param"}, torch.bfloat16)):
        kwargs = inputs(**keys).at_depths([3], in_bfloat16).kwargs
        assert kwargs["state_dtype"] == kwargs["initial_state"].dtype == dtype


def test_validation_runs_every_iteration_without_gradient_on_noise_of_its_own():
    drawn = inputs().at_depths([2, 5], WHOLE)
    assert drawn.num_steps == drawn.kwargs["num_steps"] == (5, 0)
    assert drawn.kwargs["early_read_outs"] == (2,)
    again = inputs().at_depths([9], replace(WHOLE, step=77)).kwargs["initial_state"]
    assert torch.equal(drawn.kwargs["initial_state"], again)
    for step in (1, 2, 3):  # updates count from 1
        assert not torch.equal(again, state(replace(WHOLE, step=step)))


def test_a_scheme_in_the_section_replaces_the_flavors():
    assert inputs(sampling_scheme="fixed")(WHOLE).num_steps == (3, 3)


def test_settings_that_cannot_go_together_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        inputs().at_depths([0, 3], WHOLE)
    with pytest.raises(ConfigError, match=r"recurrence\.lockstep = false needs an injection"):
        RavenInputs(tiny_config(injection="none"), RecurrenceConfig(lockstep=False), seed=0, total_steps=1)
    with pytest.raises(ConfigError, match=r'draw_per = "microbatch" needs an injection'):
        RavenInputs(
            tiny_config(injection="none"), RecurrenceConfig(draw_per="microbatch"), seed=0, total_steps=1
        )
