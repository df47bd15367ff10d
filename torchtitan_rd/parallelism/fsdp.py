"""FSDP2: parameters, gradients and optimizer state sharded over the ranks; HSDP when the mesh has two dimensions."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from torchtitan_rd.config_loader import Section


class ShardingKeys(Section):
    """The [training] keys that decide the precision and the place of the sharded parameters."""

    mixed_precision_param: Literal["bfloat16", "float32"] = Field(
        "bfloat16", json_schema_extra={"on_resume": "must_match"}
    )
    """Type in which gathered parameters and activations compute. Parameters themselves are kept in float32."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = Field(
        "float32", json_schema_extra={"on_resume": "must_match"}
    )
    """Type in which gradients are summed over the ranks."""
    enable_cpu_offload: bool = False
    """Keep the sharded parameters, gradients and optimizer state in host memory; the optimizer then runs there."""


class Plan(Protocol):
    """What this file needs of a model's wrap plan (`models/spec.py` has the fields' meaning)."""

    blocks: tuple[str, ...]
    shard_only: tuple[tuple[str, ...], ...]
    loops: tuple[tuple[str, str], ...]


def apply_fsdp(model: nn.Module, plan: Plan, mesh: DeviceMesh, keys: ShardingKeys, reshard_after_forward: str) -> None:
    """Shards the units of `plan` and then the root, which takes what is left (tied weights among it).

    Gradients are summed, not averaged: the loss is already divided by the global number of valid tokens.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, keys.mixed_precision_param),
        reduce_dtype=getattr(torch, keys.mixed_precision_reduce),
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if keys.enable_cpu_offload else OffloadPolicy()
    options = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
    reshard = reshard_after_forward != "never"
    looped = tuple(f"{unit}." for unit, _ in plan.loops)
    names = (*(name for name in plan.blocks if not name.startswith(looped)), *(unit for unit, _ in plan.loops))
    units: Sequence[tuple[str, ...]] = [*plan.shard_only[:-1], *((name,) for name in names)]
    for names in units:
        fully_shard([model.get_submodule(name) for name in names], reshard_after_forward=reshard, **options)
    for names in plan.shard_only[-1:]:
        # Backward starts with this unit: gathering it again at once would be waste.
        reshard_last = reshard_after_forward == "always"
        fully_shard([model.get_submodule(name) for name in names], reshard_after_forward=reshard_last, **options)
    fully_shard(model, reshard_after_forward=reshard_after_forward == "always", **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else a factor of 1 is a premultiplied sum, unknown to gloo
