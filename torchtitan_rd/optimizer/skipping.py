"""Updates that a flag on the device keeps from happening, so that the host need not wait to know it.

torch's fused Adam takes such a flag (`found_inf`, made for gradient scalers);
ELLISAdam and Muon take it by that name.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchtitan_rd.optimizer.ellis_adam import ELLISAdam
from torchtitan_rd.optimizer.muon import Muon, MuonAdamW
from torchtitan_rd.optimizer.shards import set_flag


def takes_flag(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether `update_unless` can be given a flag on `device`: the parameters must be there,
    and torch's Adam fused.
    """
    if isinstance(optimizer, MuonAdamW):
        return all(takes_flag(part, device) for part in optimizer.parts)
    if any(p.device.type != device.type for group in optimizer.param_groups for p in group["params"]):
        return False
    if isinstance(optimizer, ELLISAdam):
        return not optimizer.keys.tensor_wise_finite_check  # which reads what it finds
    return isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))


def update_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """One update, or none, bit for bit, where `skip` (0-dim float32 on the device) is 1.0 instead of 0.0.

    Once the host knows that it was none, it must call `take_back_counts` before the next
    update or a checkpoint.
    """
    set_flag(optimizer, skip)
    optimizer.step()
    set_flag(optimizer, None)


def take_back_counts(optimizer: Optimizer) -> None:
    """After an update that did not happen: what was counted on the host.
    Counts on the device follow the flag.
    """
    if isinstance(optimizer, ELLISAdam):
        optimizer.take_back_counts()
