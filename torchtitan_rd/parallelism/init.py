"""Initial weights that do not depend on the number of ranks.

`nn.init` on a sharded CPU tensor gives every rank the same numbers, and others than an unsharded model gets
(pytorch/pytorch#168058). So each parameter is drawn whole from a generator seeded by its own name, and every
rank keeps its part. This costs each rank the drawing of all parameters, one at a time; no communication.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan_rd.model_spec import InitFn
from torchtitan_rd.parallelism.local_part import own_part
from torchtitan_rd.parallelism.row_order import RowOrder


@torch.no_grad()
def init_weights(
    model: nn.Module, inits: Mapping[str, InitFn], seed: int, orders: Mapping[str, RowOrder] | None = None
) -> None:
    """Fills every parameter of `model` (plain or sharded, already on its device) from `seed` and its name.
    orders: of the parameters whose rows are arranged (row_order.py).
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(parameter_seed(seed, name))
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        inits[name](full, generator)
        if isinstance(parameter, DTensor):
            arranged = orders[name].arrange(full) if orders and name in orders else full
            parameter.to_local().copy_(own_part(parameter, arranged))  # every rank drew the same tensor
        else:
            parameter.copy_(full)


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed that differs for every parameter name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
