"""The learning rate is a pure function of the step."""

import pytest

from torchtitan_rd.lr_scheduler import LRSchedulerConfig, lr_factor


def factors(steps, total, **keys):
    config = LRSchedulerConfig(**keys)
    return [lr_factor(config, step, total) for step in steps]


def test_linear_warms_up_and_falls_as_the_ancestor_does():
    """(step + 1) / (warmup + 1) counted from 0, then linear to 0 at the last step (ancestors.md 19)."""
    got = factors(range(1, 11), 10, schedule="linear", warmup_steps=4)
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_cosine_is_half_way_in_the_middle_and_keeps_its_floor():
    middle, last = factors([6, 1000], 10, schedule="cosine", warmup_steps=0, min_lr_factor=0.1)
    assert middle == pytest.approx(0.55)
    assert last == pytest.approx(0.1)


def test_constant_stays():
    assert factors([3, 10], 10, schedule="constant", warmup_steps=2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("linear", [1.0, 1.0, 0.75, 0.5, 0.25]), ("1-sqrt", [1.0, 1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5])],
)
def test_a_trapezoid_is_flat_until_its_cooldown(kind, expected):
    got = factors([5, 7, 8, 9, 10], 10, schedule="trapezoid", warmup_steps=2, cooldown_steps=4, cooldown_type=kind)
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "trapezoid"])
def test_no_update_is_without_effect_and_no_rate_exceeds_the_full_one(schedule):
    got = factors(range(1, 101), 100, schedule=schedule, warmup_steps=10, cooldown_steps=20)
    assert all(0.0 < factor <= 1.0 for factor in got)
    assert max(got) == 1.0


def test_a_warm_up_longer_than_the_run_does_not_divide_by_zero():
    assert factors([1, 5], 5, schedule="linear", warmup_steps=5) == pytest.approx([1 / 6, 5 / 6])
