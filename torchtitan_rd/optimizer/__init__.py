"""[optimizer]: Adam, AdamW, ELLISAdam and Muon over sharded parameters, and their state as named tensors."""

from torchtitan_rd.optimizer.build import build_optimizer, optimizer_state, set_lr
from torchtitan_rd.optimizer.config import OptimizerConfig
from torchtitan_rd.optimizer.ellis_adam import ELLISAdam
from torchtitan_rd.optimizer.muon import Muon, MuonAdamW
from torchtitan_rd.optimizer.skipping import take_back_counts, takes_flag, update_unless

__all__ = [
    "ELLISAdam",
    "Muon",
    "MuonAdamW",
    "OptimizerConfig",
    "build_optimizer",
    "optimizer_state",
    "set_lr",
    "take_back_counts",
    "takes_flag",
    "update_unless",
]
