"""What forward takes beside tokens: nothing, or, for a recurrent model,
the depth and the noise of each microbatch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import nn

from torchtitan_rd.batch import Batch
from torchtitan_rd.data import BatchDims
from torchtitan_rd.model_spec import (
    NO_INPUTS,
    SINGLE_READ_OUT,
    DrawnInputs,
    FlopCount,
    ForwardInputs,
    Microbatch,
    ModelShape,
    ModelSpec,
    ReadOuts,
)


@dataclass(eq=False)
class Draws:
    """Places each microbatch of this rank in the run and asks the model's family what belongs to the place.

    recurrence: the section [recurrence]. dims: of training.
    positions: those of each row that this rank computes; None: all.
    Raises ConfigError if the settings cannot go together.
    """

    spec: ModelSpec
    shape: ModelShape
    recurrence: Any
    dims: BatchDims
    _: KW_ONLY
    seed: int
    total_steps: int
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    positions: range | None = None

    def __post_init__(self) -> None:
        self.own_depths = not self.recurrence.lockstep  # whether each rank draws for itself
        self.family: DrawnInputs | None = None
        if self.spec.inputs is not None:
            self.family = self.spec.inputs(
                self.shape, self.recurrence, seed=self.seed, total_steps=self.total_steps
            )

    def of_rank(self, data_rank: int) -> "Draws":
        """Those of another data rank of the run."""
        other = copy(self)
        other.dims = replace(self.dims, data_rank=data_rank)
        return other

    def training(self, step: int, number: int, batch: Batch) -> ForwardInputs:
        """For microbatch `number` (from 0) of this rank in update `step`."""
        if self.family is None:
            return NO_INPUTS
        return self.family(self._place(step, number, batch))

    def validation(self, depths: Sequence[int], held_out: Sequence[Batch]) -> ReadOuts:
        """Of a recurrent model: val_loss at its mean depth and val_loss_<depth>, each depth computed once."""
        family = self.family
        if family is None:
            return SINGLE_READ_OUT
        named = {"val_loss": family.mean_depth, **{f"val_loss_{depth}": depth for depth in depths}}
        ascending = sorted(set(named.values()))

        def forward_inputs(number: int) -> Mapping[str, object]:
            any_step = 1  # validation has noise of its own, the same at each step
            return family.at_depths(ascending, self._place(any_step, number, held_out[number])).kwargs

        return ReadOuts({name: ascending.index(depth) for name, depth in named.items()}, forward_inputs)

    def flops(self, depths: Sequence[Sequence[tuple[int, int]]]) -> FlopCount | None:
        """The mean count per token at the pace of these depths; None where nothing is drawn.

        depths: for each rank the (n, k) of its microbatches, all of the same steps.
        The costliest depth of a microbatch sets its pace: the other ranks wait for it.
        """
        if self.family is None:
            return None
        pace = [max(set(ranks), key=self._cost) for ranks in zip(*depths, strict=True)]
        return self.spec.flops(self.shape, self.seq_len, num_steps=mean_depth(pace))

    def watch(self, model: nn.Module, *, watching: bool) -> AbstractContextManager[Any]:
        """A context around a step that describes this rank's last microbatch,
        if the family can and `watching`.
        """
        return self.spec.telemetry(model) if watching and self.spec.telemetry else nullcontext()

    def describe(
        self,
        telemetry: Any,
        depths: Sequence[tuple[int, int]],
        summed: Callable[[torch.Tensor], torch.Tensor] = lambda own: own,
    ) -> dict[str, float]:
        """What `telemetry` saw, and the mean (n, k) of this rank's step; empty if nothing watched.

        summed: see Telemetry.read; collective among the ranks that share sequences, which all watch.
        """
        if telemetry is None:
            return {}
        n, k = mean_depth(depths)
        return {**telemetry.read(summed), "num_steps_no_grad": n, "num_steps_with_grad": k}

    def _cost(self, depth: tuple[int, int]) -> float:
        count = self.spec.flops(self.shape, self.seq_len, num_steps=depth)
        return count.matmul + count.attention_full

    def _place(self, step: int, number: int, batch: Batch) -> Microbatch:
        count = self.dims.microbatches_before(step) + number + 1
        return Microbatch(
            step=step,
            count=count,
            rank=self.dims.data_rank,
            samples=batch.rows,
            seq_len=self.seq_len,
            device=self.device,
            dtype=self.dtype,
            positions=self.positions,
        )


def mean_depth(depths: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """(mean n, mean k)."""
    n, k = (sum(steps) / len(depths) for steps in zip(*depths, strict=True))
    return n, k
