"""The depths of a recurrent model that a plan is made for: those that the run itself will draw."""

from dataclasses import dataclass
from functools import cache

import torch

from torchtitan_rd.batch import Batch
from torchtitan_rd.draws import mean_depth
from torchtitan_rd.model_spec import NO_INPUTS, ForwardInputs, NumSteps
from torchtitan_rd.run_plan import RunPlan

_LOOKED_AT = 2000  # updates, evenly over the run
_DRAWN = 200_000  # depths in all, some seconds: of many ranks fewer updates are looked at
_NO_ROWS = torch.empty(0, 1, dtype=torch.int64)


@dataclass(frozen=True)
class Depth:
    """name: mean, p95, max; or "" where nothing is drawn. num_steps: (n, k) that is reported.
    inputs: what forward takes beside tokens, for no rows.
    """

    name: str
    num_steps: NumSteps
    inputs: ForwardInputs

    @property
    def traced(self) -> NumSteps | None:
        """Iterations without gradient leave nothing behind, so that one stands for all."""
        n, k = self.num_steps
        return (min(n, 1), k) if self.name else None


@dataclass(frozen=True)
class Depths:
    """chosen: mean, p95 and max by FLOPs. mean: (n, k) over the updates that were looked at, each at
    the depth that sets its pace.
    """

    chosen: list[Depth]
    mean: tuple[float, float] | None


def depths_of(plan: RunPlan, steps: int) -> Depths:
    """steps: updates of the run. Asks the run's own draws, of up to 2000 updates evenly spread.

    Where each data rank draws for itself, all of them are asked, and the costliest depth of an update stands
    for it, as in metrics: the other ranks wait for it.
    """
    if plan.draws.family is None:
        return Depths([Depth("", (0, 0), NO_INPUTS)], None)
    nobody = Batch(_NO_ROWS, _NO_ROWS, None, ())
    ranks = [plan.draws]
    if plan.draws.own_depths:
        ranks = [plan.draws.of_rank(rank) for rank in range(plan.batch.data_degree)]
    looked_at = min(_LOOKED_AT, max(_DRAWN // len(ranks), 1))
    numbers = range(1, steps + 1, max(steps // looked_at, 1))

    @cache
    def count_of(num_steps: NumSteps) -> float:
        count = plan.spec.flops(plan.shape, plan.seq_len, num_steps=num_steps)
        return count.matmul + count.attention_full

    def cost(inputs: ForwardInputs) -> float:
        return count_of(inputs.num_steps)

    drawn = [max((draws.training(step, 0, nobody) for draws in ranks), key=cost) for step in numbers]
    by_cost = sorted(drawn, key=cost)
    n, k = mean_depth([inputs.num_steps for inputs in drawn])
    mean = plan.spec.flops(plan.shape, plan.seq_len, num_steps=(n, k))
    typical = min(by_cost, key=lambda inputs: abs(cost(inputs) - mean.matmul - mean.attention_full))
    picked = {
        "mean": typical,
        "p95": by_cost[min(int(0.95 * len(by_cost)), len(by_cost) - 1)],
        "max": by_cost[-1],
    }
    return Depths([Depth(name, one.num_steps, one) for name, one in picked.items()], (n, k))
