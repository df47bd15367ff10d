"""A batch that grows in stages, as a pure function of the step."""

import pytest

from torchtitan_rd.data.batch_ramp import BatchRamp, BatchRampKeys
from torchtitan_rd.errors import ConfigError


def ramp(steps, stages, batch=1024):
    return BatchRamp(BatchRampKeys(batch_ramp_steps=steps, batch_ramp_stages=stages), batch)


def test_the_sizes_are_those_of_the_ancestor():
    """As in Huginn's program: ceil(step / ramp * 16) is 1 at 4096, 2 at 4097, 8 at 32768 and 16 from 65536 on."""
    sizes = ramp(65536, 16)
    assert [sizes.of_step(step) for step in (1, 4096, 4097, 32768, 65535, 65536, 10**6)] == [1, 1, 2, 8, 16, 16, 16]


def test_what_came_before_a_step_is_the_sum_of_its_predecessors():
    sizes = ramp(10, 4)
    for step in range(1, 40):
        assert sizes.before(step) == sum(sizes.of_step(earlier) for earlier in range(1, step))


def test_without_a_ramp_every_step_is_one_stage():
    sizes = ramp(0, 8, batch=-1)
    assert (sizes.of_step(1), sizes.before(1), sizes.before(7), sizes.stages) == (1, 0, 6, 1)


@pytest.mark.parametrize("batch", [-1, 12])
def test_stages_that_do_not_divide_the_batch_are_refused_by_both_keys(batch):
    with pytest.raises(ConfigError, match=r"batch_ramp_stages = 8 must divide training\.global_batch_size"):
        ramp(10, 8, batch)
