"""A plan is of the depths that the run draws, on all of its ranks."""

import pytest

from tests.planning.common import RAVEN, config_of, plan_of
from torchtitan_rd.batch import Batch
from torchtitan_rd.planning.compute import model_flops
from torchtitan_rd.planning.draws import _NO_ROWS, depths_of

DRAWN = {"sampling_scheme": "poisson-lognormal-filling", "mean_recurrence": 8, "mean_backprop_depth": 4}
STEPS = 30


@pytest.mark.parametrize("lockstep", [True, False])
def test_the_pace_of_an_update_is_that_of_its_deepest_rank(lockstep):
    """Compared with the count in metrics, of what each of 4 ranks resolves and draws for itself."""
    model = {**RAVEN, "overrides": {**RAVEN["overrides"], **DRAWN}}
    config = config_of(model, recurrence={"lockstep": lockstep}, training={"steps": STEPS})
    plans = [plan_of(config, 4, rank) for rank in range(4)]
    nobody = Batch(_NO_ROWS, _NO_ROWS, None, ())
    drawn = [
        [plan.draws.training(step, 0, nobody).num_steps for step in range(1, STEPS + 1)] for plan in plans
    ]
    counted = plans[0].draws.flops(drawn)

    planned = depths_of(plans[0], STEPS)
    per_token = model_flops(plans[0], planned) / plans[0].tokens_per_step
    assert per_token == pytest.approx(counted.matmul + counted.attention_causal)
    assert planned.chosen[-1].num_steps in [num_steps for own in drawn for num_steps in own]
    alone = plans[0].draws.flops(drawn[:1])
    assert (counted.matmul > 1.1 * alone.matmul) is not lockstep
    assert depths_of(plans[3], STEPS).mean == planned.mean  # whichever rank plans


def test_of_many_ranks_fewer_updates_are_asked_and_the_pace_is_nearly_the_same(monkeypatch):
    model = {**RAVEN, "overrides": {**RAVEN["overrides"], **DRAWN}}
    config = config_of(model, recurrence={"lockstep": False}, training={"steps": 200})
    plan = plan_of(config, 16)
    whole = depths_of(plan, 200).mean
    monkeypatch.setattr("torchtitan_rd.planning.draws._DRAWN", 20 * 16)
    part = depths_of(plan, 200).mean
    assert part != whole and sum(part) == pytest.approx(sum(whole), rel=0.2)
