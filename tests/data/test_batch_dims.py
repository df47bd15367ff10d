"""Who reads which rows, and how many: of every rank, microbatch and stage, in the numbers that
the user gave.
"""

import pytest

from tests.data.helpers import Ranks
from torchtitan_rd.data import BatchDims, BatchKeys, DatasetKeys
from torchtitan_rd.data.fingerprint import check_fingerprint
from torchtitan_rd.errors import ConfigError, DataError


def dims(rank=0, degree=1, **keys) -> BatchDims:
    return BatchDims.resolve(BatchKeys(**keys), rank, degree)


def ramp(steps, stages, batch=1024) -> BatchDims:
    return dims(local_batch_size=1, global_batch_size=batch, batch_ramp_steps=steps, batch_ramp_stages=stages)


def test_the_sizes_of_a_growing_batch_are_those_of_the_ancestor():
    """Raven's own training: ceil(step / ramp * 16) is 1 at 4096, 2 at 4097, 8 at 32768 and 16
    from 65536 on.
    """
    steps = (1, 4096, 4097, 32768, 65535, 65536, 10**6)
    assert [ramp(65536, 16).stages_at(step) for step in steps] == [1, 1, 2, 8, 16, 16, 16]


def test_what_came_before_a_step_is_the_sum_of_its_predecessors():
    sizes = ramp(10, 4)
    for step in range(1, 40):
        assert sizes.microbatches_before(step) == sum(sizes.rows_at(earlier) for earlier in range(1, step))


def test_without_a_ramp_every_step_is_the_whole_batch():
    found = dims(degree=4, local_batch_size=2, global_batch_size=24, batch_ramp_stages=5)
    assert (found.stages, found.accumulation, found.global_batch_size) == (1, 3, 24)
    assert (found.stages_at(1), found.rows_at(1), found.rows_at(9)) == (1, 24, 24)
    assert [found.microbatches_before(step) for step in (1, 2, 7)] == [0, 3, 18]


def test_a_batch_that_is_left_open_is_one_microbatch_of_every_rank():
    found = dims(degree=4, local_batch_size=2)
    assert (found.accumulation, found.global_batch_size) == (1, 8)


@pytest.mark.parametrize("degree,local", [(1, 2), (2, 1), (4, 1), (1, 4)])
def test_the_ranks_together_hold_every_row_once_at_every_size_of_the_batch(degree, local):
    keys = {"local_batch_size": local, "global_batch_size": 16, "batch_ramp_steps": 8, "batch_ramp_stages": 4}
    ranks = [dims(rank, degree, **keys) for rank in range(degree)]
    for stages in range(1, 5):
        count = stages * ranks[0].accumulation
        rows = [row for rank in ranks for number in range(count) for row in rank.rows_of(number)]
        assert sorted(rows) == list(range(4 * stages))
    assert [lane for rank in ranks for lane in rank.lanes] == list(range(4))


def test_a_batch_knows_the_numbers_of_its_rows():
    """Two ranks, stages of 4 rows: a rank's rows of a stage stand together."""
    keys = DatasetKeys(
        seq_len=8,
        local_batch_size=1,
        global_batch_size=8,
        batch_ramp_steps=2,
        batch_ramp_stages=2,
        shuffle_seed=0,
    )
    with Ranks(keys, 2) as run:
        for stages, of_rank_0, of_rank_1 in ((1, [0, 1], [2, 3]), (None, [0, 1, 4, 5], [2, 3, 6, 7])):
            found = [loader.next_step(stages) for loader in run.loaders]
            rows = [[row for batch in batches for row in batch.rows] for batches in found]
            assert rows == [of_rank_0, of_rank_1]


@pytest.mark.parametrize("batch", [-1, 12])
def test_stages_that_do_not_divide_the_batch_are_refused_by_both_keys(batch):
    with pytest.raises(ConfigError, match=r"batch_ramp_stages = 8 must divide training\.global_batch_size"):
        ramp(10, 8, batch)


def test_a_batch_that_its_microbatches_do_not_divide_is_refused_in_the_user_s_own_numbers():
    with pytest.raises(
        ConfigError, match=r"training\.global_batch_size = 20 is not a multiple of .* 4 .* ranks = 8$"
    ):
        dims(degree=4, local_batch_size=2, global_batch_size=20)
    with pytest.raises(
        ConfigError, match=r"global_batch_size = 64 .*local_batch_size = 16 .* in each of the 8 stages"
    ):
        dims(local_batch_size=16, global_batch_size=64, batch_ramp_steps=100, batch_ramp_stages=8)


def fingerprint(**keys) -> dict:
    with Ranks(DatasetKeys(seq_len=8, local_batch_size=1, **keys)) as run:
        return run.loaders[0].fingerprint


def test_a_resume_with_another_batch_names_the_user_s_number():
    saved, present = (
        fingerprint(global_batch_size=size, batch_ramp_steps=100, batch_ramp_stages=4) for size in (16, 8)
    )
    with pytest.raises(DataError, match=r"was 16, now 8.*; set training\.global_batch_size = 16"):
        check_fingerprint(saved, present)


def test_a_checkpoint_that_noted_one_stage_as_the_batch_is_continued():
    """Of an earlier version: 4 stages of 4 rows."""
    present = fingerprint(global_batch_size=16, batch_ramp_steps=100, batch_ramp_stages=4)
    noted = {key: value for key, value in present.items() if key != "batch_ramp_stages"}
    check_fingerprint({**noted, "global_batch_size": 4}, present)
    with pytest.raises(DataError, match=r"was 32, now 16.*; set training\.global_batch_size = 32"):
        check_fingerprint({**noted, "global_batch_size": 8}, present)


def test_the_fingerprint_of_a_batch_that_does_not_grow_is_what_it_was():
    assert fingerprint(global_batch_size=16)["global_batch_size"] == 16
    assert "batch_ramp_stages" not in fingerprint(global_batch_size=16)
    assert fingerprint()["global_batch_size"] == 1
