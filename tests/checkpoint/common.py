"""A small training state, sharded where there are ranks, and a Checkpointer for it."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchtitan_rd.checkpoint import CheckpointConfig, Checkpointer

JOB = {
    "training": {"seq_len": 128, "steps": 100, "dataset": "pydoc"},
    "model": {"flavor": "debug", "extra": None},
}
SHAPE = {"name": "llama", "flavor": "debug", "dim": 4, "n_layers": 1}
# 5 rows do not divide by 2 ranks, and 1 row leaves the second rank without any.
SHAPES = {
    "tok_embeddings.weight": (5, 4),
    "layers.0.w1.weight": (8, 4),
    "norm.weight": (1, 4),
    "output.weight": (5, 4),
}


def checkpointer(
    dump: Path,
    *,
    job=JOB,
    shape=SHAPE,
    must_match=("training.seq_len",),
    row_orders=None,
    defaults=None,
    **config: Any,
) -> Checkpointer:
    config = CheckpointConfig(**{"enable": True, "interval": 1, **config})
    return Checkpointer(
        config,
        dump_folder=Path(dump),
        job_config=job,
        must_match=frozenset(must_match),
        model_shape=shape,
        row_orders=row_orders,
        shape_defaults=defaults,
    )


def training_state(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Model and AdamW state, a function of `seed` alone: DTensors sharded by rows, the step counts plain."""
    generator = torch.Generator().manual_seed(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None

    def tensor(shape):
        full = torch.randn(shape, generator=generator)
        return distribute_tensor(full, mesh, [Shard(0)]) if mesh else full

    model = {name: tensor(shape) for name, shape in SHAPES.items()}
    optimizer = {}
    for name, shape in SHAPES.items():
        optimizer |= {f"{name}.exp_avg": tensor(shape), f"{name}.exp_avg_sq": tensor(shape)}
        optimizer[f"{name}.step"] = torch.tensor(float(seed))
    return {"model": model, "optimizer": optimizer}


def digest(tensors: dict[str, dict[str, torch.Tensor]]) -> str:
    """sha256 of every full tensor with its name; collective."""
    total = hashlib.sha256()
    for group, members in sorted(tensors.items()):
        for name, tensor in sorted(members.items()):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            total.update(f"{group}.{name}".encode() + full.detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def save_steps(dump: Path, steps, **config: Any) -> None:
    """Saves the state of each step (its number is the seed) from this one process."""
    checkpoints = checkpointer(dump, **config)
    for step in steps:
        checkpoints.save(step, training_state(step), {"step": step})
    checkpoints.close()


def load_once(dump: Path, **config: Any):
    """(state, digest of the tensors) after a resume in this process;
    (None, ...) if there is nothing to resume.
    """
    checkpoints = checkpointer(dump, **config)
    tensors = training_state(999)
    try:
        return checkpoints.load(tensors), digest(tensors)
    finally:
        checkpoints.close()


def names(dump: Path) -> list[str]:
    """What lies in the checkpoint folder, but for the lock."""
    return sorted(p.name for p in (Path(dump) / "checkpoint").iterdir() if p.name != ".lock")
