"""The shape of a run's model, and the sharded model with its initial weights."""

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_rd.config import JobConfig
from torchtitan_rd.log import logger
from torchtitan_rd.model_spec import ModelSpec
from torchtitan_rd.models import get_flavor
from torchtitan_rd.parallelism import allocate, init_weights, parallelize


def resolve_shape(config: JobConfig, spec: ModelSpec, vocab_size: int) -> Any:
    """The flavor with its overrides, for data of `vocab_size` ids. Raises ConfigError, also if it is to be exported
    and cannot be."""
    shape = get_flavor(spec, config.model.flavor, config.model.overrides)
    # What an export states as its context must cover what was trained.
    context = max(shape.max_seq_len, config.training.seq_len)
    rows = config.model.padded(vocab_size)
    shape = dataclasses.replace(shape, vocab_size=rows, max_seq_len=context)
    if rows > vocab_size:
        logger.info("vocabulary of %d ids, padded to %d", vocab_size, rows)
    if config.checkpoint.last_save_in_hf:
        spec.hf.config_fields(shape)
    return shape


def build_model(config: JobConfig, spec: ModelSpec, shape: Any, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """The model, sharded over `mesh`, with its initial weights on `device` (or in host memory if offloaded)."""
    with torch.device("meta"):
        model = spec.build(shape)
    inits = spec.inits(model)
    parallelize(
        model,
        spec.wrap_plan(model),
        mesh,
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        sharding=config.training,
        loop_grad_dtype=torch.float32 if config.recurrence.core_grad_dtype == "float32" else None,
    )
    allocate(model, device, config.training.enable_cpu_offload)
    model.init_buffers(device)
    init_weights(model, inits, config.training.seed)
    model.train()
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%s %s: %s parameters, vocabulary %d", spec.name, config.model.flavor, f"{count:,}", shape.vocab_size)
    return model
