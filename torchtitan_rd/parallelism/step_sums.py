"""All that the ranks add up at the end of a step, in one all-reduce: losses, gradient norm,
whole gradients, a stop.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan_rd.parallelism.local_part import local


class StepTotals(NamedTuple):
    """The same on every rank; 0-dim float32 on the device but for `rank_losses`."""

    loss_sum: Tensor
    rank_losses: Tensor
    """(world size,): each rank's own mean loss."""
    grad_norm: Tensor
    """L2 norm of all gradients."""
    stops: Tensor
    """How many ranks ask to stop."""
    saved: Tensor
    """How many ranks have written their share of the checkpoint that is written in the background."""


class StepSums:
    """Sums a step's numbers over all ranks.

    A gradient that is a DTensor is sharded and already summed. One that is not belongs to a parameter that
    every rank holds whole: each rank then has only its own share, so these gradients ride in the same
    all-reduce and are whole afterwards. Ranks must agree on which parameters have a gradient.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        device: torch.device,
        *,
        loss_counts: bool = True,
        is_first_copy: bool = True,
    ):
        """parameters: those that are trained. device: where losses are, and where the sum is made.
        loss_counts: whether this rank's loss goes into the sum: of ranks that have the same, one.
        is_first_copy: False where another rank holds the same shards, and their placements do not say so.
        """
        self._sharded = [p for p in parameters if isinstance(p, DTensor)]
        self._whole = [p for p in parameters if not isinstance(p, DTensor)]
        # Replicas of a part hold equal gradients, and each square may count only once.
        self._replicas = {p for p in self._sharded if not (is_first_copy and _is_first_replica(p))}
        self._loss_counts = loss_counts
        self._device = device
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    @torch.no_grad()
    def __call__(self, loss_sum: Tensor, mean_loss: Tensor, *, stop: bool, saved: bool) -> StepTotals:
        """loss_sum, mean_loss: this rank's, 0-dim float32. stop, saved: this rank's,
        see StepTotals. Collective.
        """
        whole = [p.grad for p in self._whole if p.grad is not None]
        numbers = torch.zeros(3 + self._world_size, device=self._device)
        if self._loss_counts:
            numbers[0] = loss_sum
        numbers[1].fill_(float(stop))
        numbers[2].fill_(float(saved))
        numbers[3 + self._rank] = mean_loss
        # As DTensor has it: of each tensor the norm of this part, squared, summed over the parts,
        # and the root of that.
        squares = self._norms(self._sharded) ** 2

        vector = torch.cat([numbers, squares, *(gradient.flatten().float() for gradient in whole)])
        dist.all_reduce(vector)

        numbers, squares, flat = vector.tensor_split((numbers.numel(), numbers.numel() + squares.numel()))
        norms = squares**0.5
        if whole:
            _fill(whole, flat)
            norms = torch.cat([norms, self._norms(self._whole)])
        grad_norm = torch.linalg.vector_norm(norms)
        return StepTotals(numbers[0], numbers[3:], grad_norm, stops=numbers[1], saved=numbers[2])

    @torch.no_grad()
    def scale_gradients(self, norm: Tensor, max_norm: float) -> None:
        """Scales all gradients down to the L2 norm `max_norm`, given their norm:
        torch's clip_grads_with_norm_.
        """
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for parameters in (self._sharded, self._whole):  # with CPU offload they are on two devices
            gradients = _gradients(parameters)
            if gradients:
                torch._foreach_mul_(gradients, factor.to(gradients[0].device))

    def _norms(self, parameters: Sequence[Tensor]) -> Tensor:
        """The L2 norms of this rank's parts of the gradients, 0 for replicas: (gradients,), float32."""
        gradients = _gradients(parameters)
        if not gradients:
            return torch.zeros(0, device=self._device)
        norms = list(torch._foreach_norm(gradients))
        if self._replicas:
            zero = torch.zeros_like(norms[0])
            owners = [p for p in parameters if p.grad is not None]
            norms = [zero if p in self._replicas else norm for p, norm in zip(owners, norms, strict=True)]
        # With CPU offload the gradients, and so their norms, are in host memory.
        return torch.stack(norms).to(self._device, non_blocking=True)


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Copies `flat`, which holds them one after the other, back into `tensors`."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(
        list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    )


def _is_first_replica(parameter: DTensor) -> bool:
    """Whether this rank's part is the first of its copies."""
    coordinate = parameter.device_mesh.get_coordinate()
    replicated = [dim for dim, placement in enumerate(parameter.placements) if placement.is_replicate()]
    return coordinate is not None and all(coordinate[dim] == 0 for dim in replicated)
