"""Muon for matrices (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon;
arXiv 2502.16982), AdamW beside it.

torch.optim.Muon is not used: on sharded matrices it raises where a rank holds no row, gathers in
every product of the iteration, and rounds differently on each number of ranks. On a whole matrix
the two are bit-equal.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchtitan_rd.config_loader import Section
from torchtitan_rd.optimizer.shards import replace_unless, set_flag
from torchtitan_rd.parallelism.local_part import local, own_part


class MuonKeys(Section):
    """The [optimizer] keys of name = "Muon"."""

    muon_momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Muon: decay of the momentum, which is used with Nesterov's look-ahead."""
    muon_ns_steps: int = Field(5, ge=1, lt=100)
    """Muon: Newton-Schulz iterations that orthogonalize the momentum of a matrix."""
    muon_adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Muon: factor on the rate of an m x n matrix. match_rms_adamw: 0.2 sqrt(max(m, n)),
    so that lr and weight_decay of AdamW fit; original: sqrt(max(1, m / n)).
    """
    muon_adamw_lr: float | None = Field(None, gt=0.0)
    """Muon: the full learning rate of the AdamW beside it (embeddings, head, norms, biases);
    unset: lr.
    """


class Muon(Optimizer):
    """Momentum, orthogonalized: m <- lerp(m, g, 1 - momentum);
    W <- W (1 - lr wd) - lr' NS(lerp(g, m, momentum)).

    A matrix may be sharded in any way. It costs one all-gather, after which every rank orthogonalizes the
    whole of it: exact, but repeated work. With E the shorter side it is about 20 E / (6 T) of the matrix's
    forward and backward pass over the T tokens of this rank's step, so give a rank many tokens a step.
    """

    found_inf: Tensor | None = None  # see optimizer/skipping.py

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, keys: MuonKeys, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.keys = keys

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the train step has made the gradients
        momentum = self.keys.muon_momentum
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                buffer, gradient = local(state["momentum_buffer"]), local(matrix.grad)
                momenta = buffer.lerp(gradient, 1 - momentum)
                direction = _orthogonal_part(
                    matrix, gradient.lerp(momenta, momentum), self.keys.muon_ns_steps
                )
                rate = group["lr"] * _rate_factor(self.keys.muon_adjust_lr, *matrix.shape)
                weights = (
                    local(matrix).mul(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)
                )
                replace_unless(self.found_inf, buffer, momenta)
                replace_unless(self.found_inf, local(matrix), weights)


class MuonAdamW(Optimizer):
    """The two as one optimizer: the groups of both, and one state."""

    found_inf: Tensor | None = None

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self.parts = (muon, adamw)
        self.state = defaultdict(dict)
        muon.state = adamw.state = self.state

    def step(self) -> None:  # type: ignore[override]  # no closure: the train step has made the gradients
        for part in self.parts:
            set_flag(part, self.found_inf)
            part.step()


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Newton-Schulz iteration in bfloat16 towards U V^T of `matrix` = U S V^T;
    singular values end in about 0.5 to 1.5.

    The quintic and its coefficients are Jordan's: steep at zero rather than convergent.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    if tall:
        x = x.T  # the smaller Gram matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _orthogonal_part(matrix: Tensor, update: Tensor, steps: int) -> Tensor:
    """This rank's part of the orthogonalized update, of which `update` is this rank's part."""
    if not isinstance(matrix, DTensor):
        return orthogonalize(update, steps)
    mesh, placements = matrix.device_mesh, matrix.placements
    size, stride = matrix.shape, matrix.stride()  # uneven shards do not tell them
    parts = DTensor.from_local(update, mesh, placements, run_check=False, shape=size, stride=stride)
    whole = parts.full_tensor()
    own = own_part(matrix, orthogonalize(whole, steps))  # every rank has computed the same
    # Under CPU offload the whole is on the mesh's device all the same, where it is multiplied fast.
    return own.to(update.device)


def _rate_factor(rule: str, rows: int, columns: int) -> float:
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
