"""A global batch that grows to its full size over the first steps, in equal stages."""

from itertools import accumulate

from pydantic import Field

from torchtitan_rd.config_loader import Section
from torchtitan_rd.errors import ConfigError


class BatchRampKeys(Section):
    batch_ramp_steps: int = Field(0, ge=0, json_schema_extra={"on_resume": "must_match"})
    """Steps over which the global batch grows to global_batch_size. 0: full size from the first step."""
    batch_ramp_stages: int = Field(8, ge=2, json_schema_extra={"on_resume": "must_match"})
    """batch_ramp_steps: the number of sizes on the way, of equal distance: step s of r trains on
    ceil(s * stages / r) / stages of the full batch. Must divide global_batch_size."""


class BatchRamp:
    """How many stages of the batch each update trains on: a pure function of the step.

    The data is read stage by stage: a stage is one batch of the loader, of global_batch_size / stages rows. So the
    position in the data stays global, and no update depends on the number of ranks.
    """

    def __init__(self, keys: BatchRampKeys, global_batch_size: int):
        """Raises ConfigError unless the stages divide the batch."""
        self.steps, self.stages = keys.batch_ramp_steps, keys.batch_ramp_stages if keys.batch_ramp_steps else 1
        if self.steps and (global_batch_size < 1 or global_batch_size % self.stages):
            raise ConfigError(
                f"training.batch_ramp_stages = {self.stages} must divide training.global_batch_size = "
                f"{global_batch_size}, which must be given: change one, or set batch_ramp_steps = 0"
            )
        self._before = [0, *accumulate(self.of_step(step) for step in range(1, self.steps + 1))]

    def of_step(self, step: int) -> int:
        """Stages that update `step` (the first is 1) trains on."""
        return self.stages if step >= self.steps else -(-step * self.stages // self.steps)

    def before(self, step: int) -> int:
        """Stages that all updates before `step` have trained on."""
        ramped = min(step - 1, self.steps)
        return self._before[ramped] + (step - 1 - ramped) * self.stages
