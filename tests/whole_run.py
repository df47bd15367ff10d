"""A whole run of the trainer on ranks that have met already: the body of tests that compare many runs,
without the seconds that processes take to start.
"""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.launch import rows
from torchtitan_rd import job
from torchtitan_rd.config import load
from torchtitan_rd.parallelism.row_order import RowOrder
from torchtitan_rd.train import Trainer

# 2 kv heads, so that 2 ranks may share them and 4 may not; rows of 32 tokens, a vocabulary of 256 or more.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "model.name": "llama3",
        "model.flavor": "debug",
        "model.overrides": {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48},
    },
    "raven": {
        "model.name": "raven",
        "model.flavor": "debug-demo",
        "model.overrides": {
            "dim": 32, "n_heads": 4, "ffn_dim": 48, "n_layers_prelude": 1, "n_layers_coda": 1,
            "mean_recurrence": 3, "mean_backprop_depth": 2,
        },
    },
}  # fmt: skip
KEYS = {
    "training.dataset": "pydoc-train",
    "training.shuffle_seed": 0,
    "training.seq_len": 32,
    "training.local_batch_size": 1,
    "training.global_batch_size": 8,
    "training.steps": 10,
    "training.mixed_precision_param": "float32",
    "optimizer.lr": 1e-3,
    # Far above rounding: else Adam makes a step of what is zero but for it, as the gradient of keys' biases.
    "optimizer.eps": 1e-5,
    "lr_scheduler.warmup_steps": 2,
    "activation_checkpoint.mode": "none",
    "model.vocab_padding_multiple": 64,
    "metrics.log_freq": 1,
    "metrics.log_data_hash": True,
    "comm.heartbeat_seconds": 0,
}


def whole_run(rank: int, world_size: int, folder: Path, family: str, keys: dict[str, Any]) -> dict[str, Any]:
    """Trains `family` in `folder` -> the losses and hashes of the batches of each step that `folder` knows,
    and the last step's gradients, whole.
    """
    torch._dynamo.reset()
    environment = job.Environment(rank, rank, world_size, world_size, log_level="ERROR")
    # The group of run_on_ranks stands for the run's own.
    with patch.object(job, "init_process_group"), patch.object(dist, "destroy_process_group"):
        trainer = Trainer(load(arguments(folder, family, keys), environment), environment)
        status = trainer.run()
    gradients = {name: p.grad for name, p in trainer.parts.model.named_parameters() if p.grad is not None}
    orders = trainer.plan.row_orders
    history = rows(folder)
    return {
        "status": status,
        "losses": {row["step"]: row["loss"] for row in history},
        "norms": {row["step"]: row["grad_norm"] for row in history},
        "batches": {row["step"]: row["data_hash"] for row in history},
        "gradients": {name: whole(gradient, orders.get(name)) for name, gradient in gradients.items()},
    }


def arguments(folder: Path, family: str, keys: dict[str, Any]) -> list[str]:
    chosen = {**KEYS, **FAMILIES[family], **keys, "job.dump_folder": str(folder)}
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in chosen.items()
    ]


def whole(tensor: torch.Tensor, order: RowOrder | None) -> torch.Tensor:
    """With its rows in the order of the model."""
    full = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return full if order is None else order.restore(full)
