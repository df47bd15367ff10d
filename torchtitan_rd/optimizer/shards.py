"""What the optimizers share: the own part of a tensor, sums over all of its parts,
the flag that skips an update.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def set_flag(optimizer: Optimizer, skip: Tensor | None) -> None:
    """Gives `optimizer` the flag for its next update (optimizer/skipping.py)."""
    # Torch's fused Adam looks for an attribute of this name, which its class does not declare.
    optimizer.found_inf = skip  # type: ignore[attr-defined]


def replace_unless(skip: Tensor | None, old: Tensor, new: Tensor) -> None:
    """Overwrites `old` by `new` (cast to its type), unless `skip` (0-dim on the device) is
    set: decided there.
    """
    if skip is None:
        old.copy_(new)
    else:
        torch.where(skip.bool(), old, new.to(old.dtype), out=old)


def sum_over_shards(parts: Sequence[Tensor], owners: Sequence[Tensor]) -> Tensor:
    """Adds up each scalar `parts[i]` over the ranks that share `owners[i]`: (len(parts),),
    the same on all ranks.

    Collective, and one all-reduce for all owners of one mesh (on a mesh of replicas and shards,
    over the shards only), however many they are. An owner that is not sharded keeps its part.
    """
    if len({part.device for part in parts}) > 1:  # under CPU offload, what is not sharded stays on the GPU
        parts = [part.cpu() for part in parts]
    sums = list(parts)
    together = defaultdict(list)
    for i, owner in enumerate(owners):
        if isinstance(owner, DTensor):
            sharded = tuple(
                dim for dim, placement in enumerate(owner.placements) if not placement.is_replicate()
            )
            together[owner.device_mesh, sharded].append(i)
    for (mesh, dims), members in together.items():
        totals = torch.stack([parts[i] for i in members])
        for dim in dims:
            dist.all_reduce(totals, group=mesh.get_group(dim))
        for i, total in zip(members, totals.unbind(), strict=True):
            sums[i] = total
    return torch.stack(sums)
