"""[optimizer]: Adam and AdamW over sharded parameters, and their state as named tensors."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from torchtitan_rd.config_loader import Section


class OptimizerConfig(Section):
    name: Literal["AdamW", "Adam"] = Field("AdamW", json_schema_extra={"on_resume": "must_match"})
    """Adam here has no weight decay unless weight_decay is set (then it is L2 in the gradient)."""
    lr: float = Field(8e-4, gt=0.0)
    """The full learning rate; [lr_scheduler] multiplies it."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0.0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Weight decay, decoupled in AdamW."""
    no_weight_decay_for_bias_and_norm: bool = False
    """Leave one-dimensional parameters (norms, biases) out of the weight decay."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """fused: one kernel for all; foreach: one kernel an operation; for-loop: one a parameter and operation."""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer over `model`'s parameters; build it after sharding. `base_lr` of a group is its full rate."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    undecayed = [p for p in parameters if p.ndim < 2 and config.no_weight_decay_for_bias_and_norm]
    skip = {id(p) for p in undecayed}
    groups = [{"params": [p for p in parameters if id(p) not in skip], "base_lr": config.lr}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0, "base_lr": config.lr})
    return getattr(torch.optim, config.name)(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def set_lr(optimizer: Optimizer, factor: float) -> float:
    """Sets every group's rate to `factor` times its full rate; returns that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """`<parameter name>.<state name>` -> the state tensor itself (not a copy), sharded like its parameter.

    Rates and betas are not part of it: they come from the config and the step. State that the optimizer would only
    make at its first update is made now, so that a checkpoint can be loaded into it.
    """
    if not optimizer.state:
        _materialize(optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _materialize(optimizer: Optimizer) -> None:
    """One update with zero gradients and zero rate: creates the state and leaves every parameter bit-equal."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
