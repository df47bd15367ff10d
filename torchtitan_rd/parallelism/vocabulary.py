"""The vocabulary shared by the ranks of a tensor-parallel group: which ids are whose, and sums over all ids.

Shapes: N tokens, W ids of one rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class VocabularyPart:
    """The `size` ids of this rank; those of the rank before it in `mesh` end where they begin."""

    mesh: DeviceMesh
    size: int

    @classmethod
    def of(cls, tensor: torch.Tensor, dim: int) -> "VocabularyPart | None":
        """That of a tensor that may be sharded over the ids, its dimension `dim`; None: it has all."""
        if not isinstance(tensor, DTensor):
            return None
        return cls(tensor.device_mesh, tensor.to_local().shape[dim])

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> where each id is among this rank's (0 for another's), and whether it is one; both as `ids`."""
        place = ids - self.mesh.get_local_rank() * self.size
        is_own = (place >= 0) & (place < self.size)
        return place.where(is_own, 0), is_own

    def log_sums(self, logits_NW: torch.Tensor, ids_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the logsumexp over all ids, and the logit of `ids`, of each token: (N,), equal on all ranks.
        Collective: two all-reduces, of N and 2 N numbers. It has no backward.
        """
        group = self.mesh.get_group()
        largest = logits_NW.amax(dim=-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)

        place, is_own = self.find(ids_N)
        own_logits = logits_NW.gather(1, place.unsqueeze(1)).squeeze(1)
        sums = torch.stack([(logits_NW - largest.unsqueeze(1)).exp_().sum(dim=-1), own_logits * is_own])
        dist.all_reduce(sums, group=group)
        return largest + sums[0].log(), sums[1]


class LogSums(torch.autograd.Function):
    """VocabularyPart.log_sums with a backward: d logits = softmax d lse + onehot d logit."""

    @staticmethod
    def forward(
        ctx: Any, logits_NW: torch.Tensor, ids_N: torch.Tensor, part: VocabularyPart
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse, of_ids = part.log_sums(logits_NW, ids_N)
        ctx.save_for_backward(logits_NW, lse, *part.find(ids_N))
        return lse, of_ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlse: torch.Tensor, dlogit: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits_NW, lse, place, is_own = ctx.saved_tensors
        dlogits = (logits_NW - lse.unsqueeze(1)).exp_().mul_(dlse.unsqueeze(1))
        return dlogits.scatter_add_(1, place.unsqueeze(1), (dlogit * is_own).unsqueeze(1)), None, None
