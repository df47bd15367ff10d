"""Applies the techniques to a model, in the one order that keeps names and checkpoint keys clean."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_rd.model_spec import WrapPlan
from torchtitan_rd.parallelism.activation_checkpoint import (
    ActivationCheckpointConfig,
    apply_activation_checkpointing,
    checkpoint_regions,
)
from torchtitan_rd.parallelism.compile import CompileConfig, apply_compile
from torchtitan_rd.parallelism.context_parallel import apply_context_parallel, sum_over_tokens
from torchtitan_rd.parallelism.dims import ParallelDims, ParallelismConfig, groups_of, sharding_mesh
from torchtitan_rd.parallelism.fsdp import ShardingKeys, allocate, apply_fsdp, prepare_microbatch
from torchtitan_rd.parallelism.init import init_weights
from torchtitan_rd.parallelism.offload import apply_offload
from torchtitan_rd.parallelism.step_sums import StepSums, StepTotals
from torchtitan_rd.parallelism.tiled_mlp import TilingKeys, apply_tiled_mlp

__all__ = [
    "ActivationCheckpointConfig",
    "CompileConfig",
    "ParallelDims",
    "ParallelismConfig",
    "ShardingKeys",
    "StepSums",
    "StepTotals",
    "TilingKeys",
    "allocate",
    "groups_of",
    "init_weights",
    "parallelize",
    "prepare_microbatch",
    "sharding_mesh",
    "sum_over_tokens",
]


def parallelize(
    model: nn.Module,
    plan: WrapPlan,
    mesh: DeviceMesh,
    *,
    parallelism: ParallelismConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    sharding: ShardingKeys,
    tiling: TilingKeys,
    loop_grad_dtype: torch.dtype | None = None,
) -> None:
    """Changes `model` (on the meta device) in place: context parallelism -> tiles -> activation
    checkpointing -> compile -> offload of activations -> FSDP.

    Tensor parallelism, once it exists, comes before all of them. The optimizer must be built afterwards: one
    built before would hold the unsharded parameters and never get a gradient (docs/pytorch_traps.md, Order of
    wrapping).
    """
    apply_context_parallel(model, plan, mesh)
    apply_tiled_mlp([model.get_submodule(name) for name in plan.feed_forwards], tiling.mlp_tile_tokens)
    blocks = {name: model.get_submodule(name) for name in plan.blocks}
    regions = [model.get_submodule(name) for name in checkpoint_regions(plan, activation_checkpoint)]
    apply_activation_checkpointing(regions, activation_checkpoint)
    apply_compile(blocks, compile)
    apply_offload(regions, activation_checkpoint.offload)
    apply_fsdp(
        model,
        plan,
        sharding_mesh(mesh),
        sharding,
        parallelism.fsdp_reshard_after_forward,
        loop_grad_dtype,
    )
