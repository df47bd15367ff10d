"""Builds the optimizer that the config names, sets its rates, and lists its state for checkpoints."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchtitan_rd.optimizer.config import OptimizerConfig
from torchtitan_rd.optimizer.ellis_adam import ELLISAdam
from torchtitan_rd.optimizer.groups import MATRICES, parameter_groups
from torchtitan_rd.optimizer.muon import Muon, MuonAdamW


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimizer over `model`'s parameters; build it after sharding.
    `base_lr` of a group is its full rate.
    """
    groups = parameter_groups(
        model, config.lr, config.weight_decay, not config.no_weight_decay_for_bias_and_norm
    )
    adam: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    kernels: dict[str, Any] = {name: config.implementation == name for name in ("fused", "foreach")}
    if config.name == "ELLISAdam":
        return ELLISAdam(groups, **adam, keys=config)
    if config.name == "Muon":
        matrices = [group for group in groups if group["kind"] == MATRICES]
        others = [group for group in groups if group["kind"] != MATRICES]
        if config.muon_adamw_lr is not None:
            others = [{**group, "base_lr": config.muon_adamw_lr} for group in others]
            adam["lr"] = config.muon_adamw_lr
        return MuonAdamW(
            Muon(matrices, lr=config.lr, keys=config), torch.optim.AdamW(others, **adam, **kernels)
        )
    return getattr(torch.optim, config.name)(groups, **adam, **kernels)


def set_lr(optimizer: Optimizer, factor: float) -> float:
    """Sets every group's rate to `factor` times its full rate; returns that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """`<parameter name>.<state name>` -> the state tensor itself (not a copy), sharded like its parameter.

    Rates and betas are not part of it: they come from the config and the step. State that the optimizer would
    only make at its first update is made now, so that a checkpoint can be loaded into it.
    """
    if not optimizer.state:
        _materialize(optimizer)
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _materialize(optimizer: Optimizer) -> None:
    """One update with zero gradients and zero rate: creates the state and leaves
    every parameter bit-equal.
    """
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
