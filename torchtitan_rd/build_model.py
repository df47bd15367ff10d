"""The sharded model of a run, with its initial weights."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_rd.config import JobConfig
from torchtitan_rd.log import logger
from torchtitan_rd.model_spec import InitFn, Model, ModelSpec
from torchtitan_rd.parallelism import allocate, init_weights, parallelize, row_orders


def build_model(
    config: JobConfig, spec: ModelSpec, shape: Any, mesh: DeviceMesh, device: torch.device
) -> nn.Module:
    """The model, sharded over `mesh`, with its initial weights on `device` (or in host
    memory if offloaded).
    """
    model, inits = shard_model(config, spec, shape, mesh)

    # Only now is there memory: a rank holds its shards alone.
    allocate(model, device, config.training.enable_cpu_offload)
    model.init_buffers(device)
    orders = row_orders(spec.tensor_plan(model), config.parallelism.tensor_parallel_degree)
    init_weights(model, inits, config.training.seed, orders)
    model.train()

    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "%s %s: %s parameters, vocabulary %d", spec.name, config.model.flavor, f"{count:,}", shape.vocab_size
    )
    return model


def shard_model(
    config: JobConfig, spec: ModelSpec, shape: Any, mesh: DeviceMesh
) -> tuple[Model, dict[str, InitFn]]:
    """-> the model, sharded over `mesh`, on the meta device, where nothing takes memory; and what fills its
    parameters.
    """
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
        tiling=config.training,
        loop_grad_dtype=torch.float32 if config.recurrence.core_grad_dtype == "float32" else None,
        tensor_plan=spec.tensor_plan(model),
    )
    return model, inits
