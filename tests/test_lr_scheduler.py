"""The learning rate is a pure function of the step."""

import pytest

from torchtitan_rd.lr_scheduler import LRSchedulerConfig, lr_factor, schedule_warnings


def factors(steps, total, **keys):
    config = LRSchedulerConfig(**keys)
    return [lr_factor(config, step, total) for step in steps]


def test_linear_warms_up_and_falls_as_the_ancestor_does():
    """(step + 1) / (warmup + 1) counted from 0, then linear to 0 at the last step (torchtitan 0.1)."""
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
    got = factors(
        [5, 7, 8, 9, 10], 10, schedule="trapezoid", warmup_steps=2, cooldown_steps=4, cooldown_type=kind
    )
    assert got == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "trapezoid"])
def test_no_update_is_without_effect_and_no_rate_exceeds_the_full_one(schedule):
    got = factors(range(1, 101), 100, schedule=schedule, warmup_steps=10, cooldown_steps=20)
    assert all(0.0 < factor <= 1.0 for factor in got)
    assert max(got) == 1.0


def test_a_warm_up_longer_than_the_run_does_not_divide_by_zero():
    assert factors([1, 5], 5, schedule="linear", warmup_steps=5) == pytest.approx([1 / 6, 5 / 6])


HUGINN = {"convention": "huginn", "warmup_steps": 100, "cooldown_steps": 100}


def test_the_huginn_trapezoid_has_the_ancestors_numbers():
    """As Huginn's: 1000 steps, warm-up and cool-down of 100."""
    got = factors([1, 50, 100, 900, 901, 950, 1000], 1000, schedule="trapezoid", **HUGINN)
    assert got == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.99, 0.5, 0.0])


def test_the_huginn_cosine_has_the_ancestors_number_and_jumps_where_the_cool_down_starts():
    middle, before, after = factors([500, 900, 901], 1000, schedule="cosine", **HUGINN)
    assert middle == pytest.approx(0.586824, abs=1e-6)
    assert before < 0.05 and after == pytest.approx(0.99)


def test_the_huginn_cool_down_stops_at_its_floor():
    got = factors([950, 960, 990], 1000, schedule="trapezoid", min_lr_factor=0.45, **HUGINN)
    assert got == pytest.approx([0.5, 0.45, 0.45])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_cool_down_that_jumps_is_warned_of(schedule):
    assert "jumps up" in schedule_warnings(LRSchedulerConfig(schedule=schedule, cooldown_steps=5))[0]
    assert not schedule_warnings(LRSchedulerConfig(schedule=schedule))
    assert not schedule_warnings(LRSchedulerConfig(schedule="trapezoid", cooldown_steps=5))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"schedule": "trapezoid"}, ['schedule = "trapezoid" is constant']),
        ({"schedule": "constant", "min_lr_factor": 0.1}, ["min_lr_factor has no effect"]),
        (
            {"schedule": "cosine", "min_lr_factor": 0.1, "cooldown_type": "1-sqrt"},
            ["cooldown_type has no effect"],
        ),
        ({"schedule": "constant"}, []),
    ],
)
def test_keys_that_wait_for_a_cool_down_are_warned_of(keys, said):
    wanted = [f"[lr_scheduler] {what} without cooldown_steps" for what in said]
    assert schedule_warnings(LRSchedulerConfig(**keys)) == wanted
    assert not schedule_warnings(LRSchedulerConfig(**{**keys, "schedule": "trapezoid", "cooldown_steps": 5}))


def test_beyond_the_end_the_floor_holds():
    assert factors(
        [11, 99], 10, schedule="trapezoid", warmup_steps=0, cooldown_steps=4, min_lr_factor=0.1
    ) == pytest.approx([0.1, 0.1])
