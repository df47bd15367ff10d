"""A global batch that grows to its full size over the first steps."""

from pydantic import Field

from torchtitan_rd.config_loader import Section


class BatchRampKeys(Section):
    batch_ramp_steps: int = Field(0, ge=0)
    """Steps over which the global batch grows linearly to global_batch_size, in whole microbatches of every rank.
    0: full size from the first step."""


def ramped_accumulation(step: int, ramp_steps: int, accumulation: int) -> int:
    """Microbatches of each rank in update `step` (the first is 1); from `ramp_steps` on it is `accumulation`.

    ceil(step / ramp_steps * accumulation), in integers. docs/migration.md says how this relates to a ramp that is
    counted in microbatches.
    """
    if step >= ramp_steps:
        return accumulation
    return -(-step * accumulation // ramp_steps)
