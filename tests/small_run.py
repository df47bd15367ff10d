"""A tiny Llama trained in-process for a few steps: the body that the parallelism and step tests
run on their ranks.

The same body runs on the CPU and on GPUs: `Setup.device` says where, and so does `device` of tests/ranks.py.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from torchtitan_rd.build_model import build_model
from torchtitan_rd.config import JobConfig
from torchtitan_rd.data import Batch
from torchtitan_rd.models import get_flavor, get_spec
from torchtitan_rd.optimizer import build_optimizer
from torchtitan_rd.parallelism import GradientExchange, ParallelDims
from torchtitan_rd.train_step import TrainStep

VOCAB, SEQ_LEN, GLOBAL_BATCH = 64, 16, 8


@dataclass(frozen=True)
class Setup:
    """Sections as {section: {key: value}}, how many steps, whether labels are padded,
    and where in which precision.

    device: "cpu", or "cuda": the rank's current GPU.
    dtype: of the sharded parameters in forward and backward.
    """

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    padded: bool = False
    device: str = "cpu"
    dtype: str = "float32"


def config_of(setup: Setup, world_size: int) -> JobConfig:
    training = {
        "local_batch_size": setup.sections.get("training", {}).get(
            "local_batch_size", GLOBAL_BATCH // world_size
        ),
        "global_batch_size": GLOBAL_BATCH,
        "seq_len": SEQ_LEN,
        "mixed_precision_param": setup.dtype,
    }
    sections = {
        "activation_checkpoint": {"mode": "none"},
        "optimizer": {"lr": 1e-2},
        **setup.sections,
        "training": {**training, **setup.sections.get("training", {})},
    }
    fields = JobConfig.model_fields
    return JobConfig(
        **{name: fields[name].annotation.model_validate(keys) for name, keys in sections.items()}
    )


def make(setup: Setup, world_size: int, **options: Any) -> tuple[JobConfig, torch.nn.Module, TrainStep]:
    """options: of TrainStep."""
    config = config_of(setup, world_size)
    spec = get_spec("llama3")
    overrides = {"dim": 32, "n_layers": 4, "ffn_dim": 48, **setup.overrides}
    shape = replace(get_flavor(spec, "debug", overrides), vocab_size=VOCAB)
    device = (
        torch.device("cpu") if setup.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    )
    mesh = ParallelDims.resolve(config.parallelism, world_size).build_mesh(device.type)
    model = build_model(config, spec, shape, mesh, device)
    optimizer = build_optimizer(model, config.optimizer)
    options = {"exchange": GradientExchange(model, config.parallelism, config.training, mesh), **options}
    return config, model, TrainStep(model, optimizer, config.training, device, **options)


def batches_of(step: int, rank: int, world_size: int, config: JobConfig, padded: bool) -> list[Batch]:
    """This rank's microbatches of a global batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    # Row g keeps g + 1 labels, so ranks and microbatches have very different numbers of valid tokens.
    if padded:
        for row in range(GLOBAL_BATCH):
            labels[row, row + 1 :] = -100
    share = GLOBAL_BATCH // world_size
    size = config.training.local_batch_size
    rows = range(rank * share, (rank + 1) * share, size)
    return [Batch(inputs[r : r + size], labels[r : r + size], None, range(r, r + size)) for r in rows]


def train(rank: int, world_size: int, setup: Setup) -> dict[str, Any]:
    """Runs `setup`; returns losses, gradient norms, checkpoint keys and hashes of the full
    tensors before and after.
    """
    config, model, step_function = make(setup, world_size)
    before = hash_of(model)
    results = [
        step_function(step, batches_of(step, rank, world_size, config, setup.padded))
        for step in range(1, setup.steps + 1)
    ]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "keys": sorted(model.state_dict()),
        "names": sorted(name for name, _ in model.named_parameters()),
        "before": before,
        "after": hash_of(model),
        "gradients": {name: p.grad.full_tensor().cpu().clone() for name, p in model.named_parameters()},
        "places": {p.device.type for p in model.parameters()},
    }


def hash_of(model: torch.nn.Module) -> str:
    """sha256 over the full parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(name.encode() + parameter.full_tensor().cpu().numpy().tobytes())
    return digest.hexdigest()


def all_equal(value: Any) -> bool:
    """Whether every rank has the same value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)
