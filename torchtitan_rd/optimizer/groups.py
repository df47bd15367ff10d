"""Which parameter belongs to which group: by name and shape, so that no model has to be known here."""

import re
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan_rd.errors import ConfigError

MATRICES, EMBEDDINGS, NORMS = "matrices", "embeddings and head", "norms and biases"

# Of the module that owns the parameter.
_EMBEDDING = re.compile(r"embed|^wte$|^lm_head$|^output$")
_NORM = re.compile(r"norm|^ln_f$")


def group_of(name: str, ndim: int) -> str:
    """The group of the parameter `name`.
    Raises ConfigError for a tensor of more dimensions that no rule knows.
    """
    module, _, own = name.rpartition(".")
    module = module.rpartition(".")[2]
    if _EMBEDDING.search(module):
        return EMBEDDINGS
    if ndim < 2 or _NORM.search(module) or "bias" in own:
        return NORMS
    if ndim == 2:
        return MATRICES
    raise ConfigError(
        f"[optimizer] the parameter {name!r} with {ndim} dimensions is neither a matrix, an embedding, "
        f"a norm nor a bias: give it a name that optimizer/groups.py knows"
    )


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, decay_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in groups, each with its `kind`; a tied one comes once.

    Sharded parameters and those that every rank holds whole never share a group:
    torch's kernels take one sort.
    """
    members: dict[tuple[str, bool], list[nn.Parameter]] = {
        (kind, sharded): [] for kind in (MATRICES, EMBEDDINGS, NORMS) for sharded in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[group_of(name, parameter.ndim), isinstance(parameter, DTensor)].append(parameter)
    return [
        {
            "params": parameters,
            "kind": kind,
            "base_lr": lr,
            "weight_decay": 0.0 if kind == NORMS and not decay_norms_and_biases else weight_decay,
        }
        for (kind, _), parameters in members.items()
        if parameters
    ]
