"""FSDP2: parameters, gradients and optimizer state sharded over the ranks;
HSDP when the mesh has two dimensions.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from torchtitan_rd.config_loader import MUST_MATCH, Section
from torchtitan_rd.model_spec import WrapPlan
from torchtitan_rd.parallelism.local_part import local


class ShardingKeys(Section):
    """The [training] keys that decide the precision and the place of the sharded parameters."""

    mixed_precision_param: Literal["bfloat16", "float32"] = Field("bfloat16", json_schema_extra=MUST_MATCH)
    """Type in which gathered parameters and activations compute.
    Parameters themselves are kept in float32.
    """
    mixed_precision_reduce: Literal["float32", "bfloat16"] = Field("float32", json_schema_extra=MUST_MATCH)
    """Type in which gradients are summed over the ranks, and with copies of the model (HSDP)
    over microbatches too.
    """
    enable_cpu_offload: bool = False
    """Keep the sharded parameters, gradients and optimizer state in host memory;
    the optimizer then runs there.
    """


# A loop's parameters stay gathered from forward to backward up to this size. While the loop itself runs they
# are held in any case; the rule holds them in the few units behind it too, and saves the largest all-gather
# of the step. The core of the 3.5 B raven is 3.3 GB in bfloat16.
KEPT_LOOP_BYTES = 4 * 2**30


def apply_fsdp(
    model: nn.Module,
    plan: WrapPlan,
    mesh: DeviceMesh,
    keys: ShardingKeys,
    reshard_after_forward: str,
    loop_grad_dtype: torch.dtype | None = None,
    prefetch_units: int = 1,
) -> None:
    """Shards the units of `plan` and then the root, which takes what is left (tied weights among it).

    Gradients are summed, not averaged: the loss is already divided by the global number of valid tokens.
    Those of `plan.full_precision` are not summed here but by the train step: see `kept_whole`.

    loop_grad_dtype: in which the uses of a weight inside a loop are summed;
    None: the type that it computes in.
    prefetch_units: how many units are gathered ahead of the one that computes.
    """
    param_dtype = getattr(torch, keys.mixed_precision_param)
    precision = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=getattr(torch, keys.mixed_precision_reduce),
        cast_forward_inputs=False,
    )
    float32 = replace(precision, param_dtype=None)  # parameters are kept in float32
    offload = CPUOffloadPolicy() if keys.enable_cpu_offload else OffloadPolicy()
    parameters = dict(model.named_parameters())
    whole = {parameters[name] for name in kept_whole(plan, keys)}

    def shard(*names: str, reshard: bool) -> None:
        fully_shard(
            [model.get_submodule(name) for name in names],
            mesh=mesh,
            mp_policy=float32 if names[0] in plan.float32_units else precision,
            offload_policy=offload,
            ignored_params=whole,
            reshard_after_forward=reshard,
        )

    default, always = reshard_after_forward == "default", reshard_after_forward == "always"
    looped = tuple(f"{unit}." for unit, _ in plan.loops)
    blocks = [(name,) for name in plan.blocks if not name.startswith(looped)]
    for names in (*plan.shard_only[:-1], *blocks):
        shard(*names, reshard=default or always)
    for unit, _ in plan.loops:
        keep = gathered_bytes(model.get_submodule(unit), param_dtype) <= KEPT_LOOP_BYTES
        shard(unit, reshard=always or (default and not keep))
    for names in plan.shard_only[-1:]:
        # Backward starts with this unit: gathering it again at once would be waste.
        shard(*names, reshard=always)
    shard("", reshard=always)

    _prefetch(model, plan, prefetch_units)
    if loop_grad_dtype is not None:
        for unit, _ in plan.loops:
            _sum_gradients_in(loop_grad_dtype, model.get_submodule(unit))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # Else a factor of 1 is a premultiplied sum, unknown to gloo.
            module.set_force_sum_reduction_for_comms(True)


def gathered_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """What the parameters of `module` take on each rank while they are gathered, computing in `dtype`."""
    return sum(local(parameter).numel() for parameter in module.parameters()) * dtype.itemsize


def _prefetch(model: nn.Module, plan: WrapPlan, units: int) -> None:
    """Starts the gathers of `units` units ahead, and those up to the first loop at the beginning of forward.

    By default each gather is issued when the unit before it starts, so that of the loop, by far the largest,
    would overlap one small block alone. The prelude is gathered a little early for it. In backward torch
    itself gathers the unit before, and a loop that was not freed needs none.
    """
    if units == 1 and not plan.loops:
        return
    names = forward_order(plan)
    root, order = _unit(model, ""), [_unit(model, name) for name in names]
    early = names.index(plan.loops[0].unit) + 1 if plan.loops else 0
    if units > 1:
        early = max(early, units)
        root.set_modules_to_backward_prefetch(order[-units:][::-1])
        for i, unit in enumerate(order):
            unit.set_modules_to_forward_prefetch(order[i + 1 : i + 1 + units])
            unit.set_modules_to_backward_prefetch(order[max(i - units, 0) : i][::-1])
    root.set_modules_to_forward_prefetch(order[:early])


def forward_order(plan: WrapPlan) -> list[str]:
    """The first name of each unit but the root."""

    def unit_of(block: str) -> str:
        return next((unit for unit, _ in plan.loops if block.startswith(f"{unit}.")), block)

    blocks = dict.fromkeys(unit_of(block) for block in plan.blocks)
    first, last = ([names[0] for names in part] for part in (plan.shard_only[:-1], plan.shard_only[-1:]))
    return [*first, *blocks, *last]


def _unit(model: nn.Module, name: str) -> FSDPModule:
    """The submodule `name`, to which `fully_shard` has given FSDP's class."""
    module = model.get_submodule(name)
    if not isinstance(module, FSDPModule):
        raise TypeError(f"{name} is no unit of FSDP")
    return module


def kept_whole(plan: WrapPlan, keys: ShardingKeys) -> tuple[str, ...]:
    """The parameters that stay plain tensors in float32, equal on all ranks;
    each rank has a gradient of its own.

    FSDP gathers and reduces a unit in one type, so a float32 norm in a bfloat16 block would need a unit of
    its own: three more collectives a block. They are small; held whole, their gradients are summed once a
    step (step_sums.py).
    """
    return () if keys.mixed_precision_param == "float32" else plan.full_precision


def allocate(model: nn.Module, device: torch.device, offload: bool) -> None:
    """Gives the sharded `model`, so far on the meta device, memory on `device` with undefined content.

    offload: shards stand in host memory; FSDP copies them as it gathers.
    What it does not gather must be on `device`.
    """
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules():
        if offload and any(not isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)


def _sum_gradients_in(dtype: torch.dtype, unit: nn.Module) -> None:
    """Makes autograd cast each contribution to a weight's gradient to `dtype` before it adds them up."""

    def mark(module: nn.Module, inputs: tuple) -> None:
        # FSDP puts its gathered parameters in place just before; they are others than those of `unit` now.
        for parameter in module.parameters():
            parameter.grad_dtype = dtype

    unit.register_forward_pre_hook(mark)
