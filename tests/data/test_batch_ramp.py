"""A global batch that grows with the step."""

import pytest

from torchtitan_rd.data.batch_ramp import ramped_accumulation


@pytest.mark.parametrize(("step", "expected"), [(1, 1), (4096, 1), (4097, 2), (32768, 8), (65536, 16), (65537, 16)])
def test_the_ramp_has_the_ancestors_numbers(step, expected):
    """ancestors.md 6: 128 sequences a device in microbatches of 8, over 65536."""
    assert ramped_accumulation(step, 65536, 128 // 8) == expected


def test_without_a_ramp_the_batch_is_full_at_once():
    assert [ramped_accumulation(step, 0, 4) for step in (1, 2, 100)] == [4, 4, 4]


def test_the_ramp_never_falls_and_takes_each_size():
    sizes = [ramped_accumulation(step, 10, 3) for step in range(1, 15)]
    assert sizes == sorted(sizes) and set(sizes) == {1, 2, 3} and sizes[9] == 3
