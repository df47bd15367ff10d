"""Checkpoints: torch.distributed.checkpoint files, verified, committed by one rename and
read without trust.
"""

from torchtitan_rd.checkpoint.checkpointer import Checkpointer
from torchtitan_rd.checkpoint.config import CheckpointConfig
from torchtitan_rd.checkpoint.folders import saved_states
from torchtitan_rd.checkpoint.manifest import read_manifest, verify
from torchtitan_rd.checkpoint.run_folder import locked_run_folder
from torchtitan_rd.checkpoint.safe_reader import SafeReader, TensorInfo
from torchtitan_rd.checkpoint.saves import leave_stuck_saves

__all__ = [
    "CheckpointConfig",
    "Checkpointer",
    "SafeReader",
    "TensorInfo",
    "leave_stuck_saves",
    "locked_run_folder",
    "read_manifest",
    "saved_states",
    "verify",
]
