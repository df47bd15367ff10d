"""models/raven/recurrence.py: depths are those of the ancestor, step by step."""

import math
import statistics

import pytest
from pydantic import ValidationError

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.models.raven.recurrence import SCHEMES, DepthSampler, Ramp, RecurrenceConfig

FILLING = "poisson-lognormal-filling"


def sampler(
    scheme: str = FILLING, mean: int = 32, backprop: int = 8, total_steps: int = 100, **keys
) -> DepthSampler:
    return DepthSampler(
        RecurrenceConfig(**keys),
        scheme=scheme,
        mean_recurrence=mean,
        mean_backprop_depth=backprop,
        total_steps=total_steps,
    )


UNIFORM_K = [13, 9, 11, 12, 8, 10, 6, 6, 2, 4, 13, 8]
N_OF_12_STEPS = {
    FILLING: [21, 21, 25, 44, 32, 8, 27, 21, 9, 9, 45, 12],
    "poisson-lognormal-fill": [20, 22, 24, 37, 29, 11, 26, 21, 13, 12, 38, 14],
    "poisson-unbounded": [15, 25, 20, 18, 16, 26, 19, 28, 23, 26, 18, 28],
    "poisson-fill": [15, 25, 20, 18, 16, 26, 19, 28, 23, 26, 18, 28],
    "poisson-bounded": [15, 25, 20, 18, 16, 26, 19, 28, 23, 26, 18, 28],
    "poisson-lognormal": [20, 22, 24, 37, 29, 11, 26, 21, 13, 12, 38, 14],
    "bptt": [26, 8, 40, 32, 17, 6, 35, 5, 22, 35, 11, 37],
    "non-uniform": [13, 0, 29, 20, 9, 0, 29, 0, 20, 31, 0, 29],
    "gupta": [26, 8, 40, 32, 17, 6, 35, 5, 22, 35, 11, 37],
    "sobol": [19, 25, 21, 47, 36, 15, 21, 43, 23, 29, 46, 0],
    "fixed": [24] * 12,
    "full": [0] * 12,
    "non-recurrent": [0] * 12,
}
K_OF_12_STEPS = {
    **dict.fromkeys(("poisson-unbounded", "poisson-bounded", "simple", "geometric", "full"), UNIFORM_K),
    **dict.fromkeys(("poisson-lognormal", "non-uniform", "negative-binomial"), UNIFORM_K),
    "bptt": [13, 9, 3, 12, 8, 10, 11, 6, 2, 12, 13, 10],
    "gupta": [1] * 12,  # the ancestor's third, fourth and seventh are 0
    "sobol": [4, 3, 5, 10, 7, 3, 4, 14, 4, 8, 1, 9],
    **dict.fromkeys((FILLING, "poisson-lognormal-fill", "poisson-fill", "fixed"), [8] * 12),
    "non-recurrent": [1] * 12,
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_twelve_draws_are_the_ancestors(scheme):
    draws = [sampler(scheme).draw(step) for step in range(1, 13)]
    if scheme in N_OF_12_STEPS:
        assert [n for n, _ in draws] == N_OF_12_STEPS[scheme]
    assert [k for _, k in draws] == K_OF_12_STEPS[scheme]


@pytest.mark.parametrize(
    ("scheme", "mean_n"), [("simple", 23.5), ("geometric", 24.0), ("poisson-unbounded", 24.0)]
)
def test_schemes_without_a_vector_have_their_mean_and_range(scheme, mean_n):
    draws = [sampler(scheme).draw(step) for step in range(1, 3001)]
    assert statistics.mean(n for n, _ in draws) == pytest.approx(mean_n, rel=0.05)
    assert statistics.mean(k for _, k in draws) == pytest.approx(8.5, rel=0.05)
    assert {k for _, k in draws} == set(range(1, 17))
    if scheme == "simple":
        assert {n for n, _ in draws} == set(range(48))


def test_a_negative_binomial_has_its_mean_and_twice_its_variance():
    draws = [sampler("negative-binomial").draw(step)[0] for step in range(1, 5001)]
    assert statistics.mean(draws) == pytest.approx(24.0, rel=0.02)
    assert statistics.variance(draws) == pytest.approx(48.0, rel=0.06)


def test_bounded_draws_stop_at_2t_minus_1():
    draws = [sampler("poisson-bounded", mean=10, backprop=8).draw(step)[0] for step in range(1, 200)]
    assert set(draws) == {0, 1, 2, 3}


def test_a_curriculum_scales_both_means_up_to_its_last_step():
    draws = [sampler(f"{FILLING}-curriculum-100").draw(step) for step in (1, 10, 50, 100, 101)]
    assert draws == [(1, 1), (1, 1), (2, 4), (7, 8), (33, 8)]
    fixed = sampler("fixed-curriculum-10")
    assert [fixed.draw(step) for step in (1, 5, 10, 11)] == [(3, 1), (12, 4), (24, 8), (24, 8)]


def test_the_default_scheme_has_the_published_statistics_over_20000_steps():
    draws = [sampler().draw(step) for step in range(1, 20_001)]
    depths = sorted(n + k for n, k in draws)
    assert statistics.mean(depths) == pytest.approx(32.92, abs=0.005)
    assert [depths[10_000], depths[19_000], depths[19_800], depths[-1]] == [29, 67, 94, 175]
    assert statistics.mean(k for _, k in draws) == pytest.approx(7.98, abs=0.005)
    assert sum(k < 8 for _, k in draws) / 20_000 == pytest.approx(0.009, abs=0.0005)
    assert sampler(max_steps_no_grad=59).share_capped() == sum(n > 59 for n, _ in draws) / 20_000


def test_a_cap_shortens_deep_draws_alone_and_says_how_many():
    free, capped = sampler(), sampler(max_steps_no_grad=30)
    pairs = [(free.draw(step), capped.draw(step)) for step in range(1, 201)]
    assert all(b == (min(a[0], 30), a[1]) for a, b in pairs)
    assert capped.share_capped(200) == sum(a[0] > 30 for a, _ in pairs) / 200
    assert free.share_capped() == 0.0


def test_ranks_draw_alike_in_lockstep_and_from_seeds_of_their_own_otherwise():
    assert sampler().draw(3, rank=5) == sampler().draw(3)
    loose = sampler(lockstep=False)
    assert loose.draw(3, rank=0) == sampler().draw(3)
    # Rank r is seeded by (514229 + step) * (r + 1), which is also rank 0's seed at another step.
    assert loose.draw(3, rank=1) == sampler().draw(2 * (514229 + 3) - 514229)


def test_the_microbatches_of_a_step_share_its_draw_unless_each_shall_have_its_own():
    assert sampler().draw(2, microbatch=9) == sampler().draw(2)
    assert sampler(draw_per="microbatch").draw(2, microbatch=9) == sampler().draw(9)
    assert sampler(draw_per="microbatch").draw(2, microbatch=2) == sampler().draw(2)


@pytest.mark.parametrize("kind", ["linear", "1-sqrt"])
def test_a_ramp_rises_from_start_to_end_and_stays_there(kind):
    ramp = Ramp(2, 32, 100, kind)
    values = [ramp.at(step) for step in range(1, 200)]
    assert values == sorted(values) and values[0] == 3 and set(values[99:]) == {32}
    share = 0.5 if kind == "linear" else 1 - math.sqrt(0.5)
    assert ramp.at(50) == math.ceil(2 + 30 * share)


def test_both_means_can_be_ramped_over_a_share_of_the_run():
    ramped = sampler(
        "fixed",
        total_steps=1000,
        mean_recurrence_start=4,
        mean_recurrence_warmup=0.5,
        mean_backprop_depth_start=2,
        mean_backprop_depth_warmup=0.1,
        mean_backprop_depth_warmup_type="1-sqrt",
    )
    assert ramped.draw(1) == (5 - 3, 3)
    assert ramped.draw(100) == (math.ceil(4 + 28 * 0.2) - 8, 8)
    assert ramped.draw(500) == ramped.draw(1000) == (24, 8)


def test_the_backprop_depth_may_follow_the_mean_while_a_ramp_is_below_it():
    """arXiv 2511.07384: all iterations are differentiated until their mean passes the backprop depth."""
    ramp = {"total_steps": 1000, "mean_recurrence_start": 1, "mean_recurrence_warmup_type": "1-sqrt"}
    following, fixed = sampler("fixed", **ramp, backprop_depth_follows_mean=True), sampler("fixed", **ramp)
    for step in range(1, 400):
        mean = 1 + math.ceil(31 * (1 - math.sqrt(max(1 - step / 250, 0))))
        assert following.draw(step) == (max(mean - 8, 0), min(mean, 8))
        assert fixed.draw(step) == (max(mean - 8, 0), 8)
    assert sampler("fixed", 4, 8, backprop_depth_follows_mean=True).draw(1) == (0, 4)
    # What is drawn at a mean of 2 (Huginn's draw adds 1 to it), not at the backprop depth.
    drawing = sampler(FILLING, **ramp, backprop_depth_follows_mean=True)
    first = [drawing._uncapped(1, i, 0) for i in range(1, 401)]
    assert 2.7 < sum(n + k for n, k in first) / 400 < 3.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampler("poison-fill"), "did you mean 'poisson-fill'"),
        (lambda: sampler("fixed-curriculum-0"), "needs at least 1 step"),
        (lambda: sampler("fixed-curriculum-x"), "no sampling scheme"),
        (lambda: sampler("simple", 8, 8), "mean_recurrence > mean_backprop_depth, but they are 8 and 8"),
        (lambda: sampler("poisson-lognormal-fill", 4, 8), "4 and 8 at step 1"),
        (
            lambda: sampler("geometric", mean_recurrence_start=1),
            "needs mean_recurrence > mean_backprop_depth",
        ),
    ],
)
def test_a_scheme_that_cannot_be_drawn_is_one_clear_message(call, message):
    with pytest.raises(ConfigError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_wrong_scheme_in_the_section_is_named_while_the_file_is_read():
    with pytest.raises(ValidationError, match="did you mean 'geometric'"):
        RecurrenceConfig(sampling_scheme="geometrc")


@pytest.mark.parametrize(
    "scheme", [FILLING, "poisson-fill", "poisson-unbounded", "fixed", "full", "non-recurrent"]
)
def test_schemes_that_need_no_gradient_free_steps_take_a_mean_below_the_backprop_depth(scheme):
    assert all(k >= 1 for _, k in (sampler(scheme, 4, 8).draw(step) for step in range(1, 50)))


def test_a_geometric_of_mean_one_is_always_one():
    assert {sampler("geometric", 9, 8).draw(step)[0] for step in range(1, 20)} == {1}
