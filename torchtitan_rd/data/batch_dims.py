"""Who reads which rows of the global batch, and how many there are: decided once, here,
in the user's own numbers.

The sister of `parallelism.ParallelDims`. All that counts rows,
microbatches or the tokens of a step asks BatchDims.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from pydantic import Field, field_validator

from torchtitan_rd.config_loader import MUST_MATCH, Section
from torchtitan_rd.errors import ConfigError


class BatchKeys(Section):
    local_batch_size: int = Field(8, ge=1)
    """Sequences per rank per microbatch."""

    global_batch_size: int = -1
    """Sequences per step over all ranks; what exceeds one microbatch of every rank is accumulated. -1: one
    microbatch of every rank, which changes with the number of ranks, so that only a fixed value lets a run
    resume on another number of ranks.
    """

    batch_ramp_steps: int = Field(0, ge=0, json_schema_extra=MUST_MATCH)
    """Steps over which the global batch grows to global_batch_size. 0: full size from the first step."""

    batch_ramp_stages: int = Field(8, ge=2, json_schema_extra=MUST_MATCH)
    """batch_ramp_steps: the number of sizes on the way, of equal distance: step s of r trains on
    ceil(s * stages / r) / stages of the full batch. Must divide global_batch_size."""

    @field_validator("global_batch_size")
    @classmethod
    def _positive_or_derived(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError("must be at least 1, or -1 for local_batch_size * the number of data ranks")
        return value


@dataclass(frozen=True)
class BatchDims:
    """The global batch of a full step: `stages` equal stages of `accumulation` microbatches
    of every data rank.

    Without a ramp there is one stage. The data is read stage by stage: a stage holds the rows of rank 0, then
    those of rank 1, and so on, each cut into microbatches. So the position in the data is global, and no
    update depends on the number of ranks. While the batch grows, a step trains on the first stages alone.
    """

    data_rank: int
    data_degree: int
    local_batch_size: int
    accumulation: int
    stages: int = 1
    ramp_steps: int = 0

    @classmethod
    def resolve(cls, keys: BatchKeys, data_rank: int, data_degree: int) -> "BatchDims":
        """Fills in -1 and checks what must divide. Raises ConfigError naming the user's own numbers."""
        at_once = keys.local_batch_size * data_degree
        if not keys.batch_ramp_steps:
            accumulation = cls._microbatches(keys, at_once, stages=1)
            return cls(data_rank, data_degree, keys.local_batch_size, accumulation)
        stages = keys.batch_ramp_stages
        if keys.global_batch_size == -1 or keys.global_batch_size % stages:
            raise ConfigError(
                f"training.batch_ramp_stages = {stages} must divide training.global_batch_size = "
                f"{keys.global_batch_size}, which must be given: change one, or set batch_ramp_steps = 0"
            )
        accumulation = cls._microbatches(keys, at_once, stages)
        return cls(data_rank, data_degree, keys.local_batch_size, accumulation, stages, keys.batch_ramp_steps)

    @staticmethod
    def _microbatches(keys: BatchKeys, at_once: int, stages: int) -> int:
        """Of a rank in one stage."""
        if keys.global_batch_size == -1:
            return 1
        if keys.global_batch_size % (at_once * stages):
            each = f" in each of the {stages} stages (training.batch_ramp_stages)" if stages > 1 else ""
            raise ConfigError(
                f"training.global_batch_size = {keys.global_batch_size} is not a multiple of "
                f"training.local_batch_size = {keys.local_batch_size} times the "
                f"{at_once // keys.local_batch_size} data ranks = {at_once}{each}"
            )
        return keys.global_batch_size // (at_once * stages)

    @property
    def rows_per_rank(self) -> int:
        """In one stage."""
        return self.local_batch_size * self.accumulation

    @property
    def rows_per_stage(self) -> int:
        """Of all ranks."""
        return self.rows_per_rank * self.data_degree

    @property
    def global_batch_size(self) -> int:
        """Rows of a step at full size, of all ranks."""
        return self.rows_per_stage * self.stages

    @property
    def lanes(self) -> range:
        """The rows of each stage that this rank reads."""
        return range(self.data_rank * self.rows_per_rank, (self.data_rank + 1) * self.rows_per_rank)

    def rows_of(self, number: int) -> range:
        """The rows of the global batch in microbatch `number` (from 0) of this rank."""
        stage, number_in_stage = divmod(number, self.accumulation)
        first = stage * self.rows_per_stage + self.lanes.start + number_in_stage * self.local_batch_size
        return range(first, first + self.local_batch_size)

    def stages_at(self, step: int) -> int:
        """Stages that update `step` (the first is 1) trains on."""
        return self.stages if step >= self.ramp_steps else -(-step * self.stages // self.ramp_steps)

    def rows_at(self, step: int) -> int:
        """Rows of all ranks that update `step` trains on."""
        return self.stages_at(step) * self.rows_per_stage

    def stage_of(self, number: int) -> tuple[int, int]:
        """The update (the first is 1), and which of its stages (from 0), that reads stage `number` of the
        run, counted from 0 over all updates.
        """
        ramped = self._ramped_stages
        if number < ramped[-1]:
            step = bisect_right(ramped, number)
            return step, number - ramped[step - 1]
        steps, stage = divmod(number - ramped[-1], self.stages)
        return self.ramp_steps + 1 + steps, stage

    def microbatches_before(self, step: int) -> int:
        """Of this rank, in all updates before `step`."""
        ramped = min(step - 1, self.ramp_steps)
        stages = self._ramped_stages[ramped] + (step - 1 - ramped) * self.stages
        return stages * self.accumulation

    @cached_property
    def _ramped_stages(self) -> list[int]:
        """Stages of the first 0, 1, 2, ... updates, to the end of the ramp."""
        return [0, *accumulate(self.stages_at(step) for step in range(1, self.ramp_steps + 1))]
