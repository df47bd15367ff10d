"""The first state of the recurrence: noise. Needs torch alone.

Shapes: T tokens, P positions, E n_embd.
"""

import hashlib
import math
from typing import Any

import torch
from torch import nn


def is_noise(config: Any) -> bool:
    """Whether the state starts from noise: not if it starts at e (injection "none") or from zeros."""
    return config.injection_type != "none" and config.state_init != "zero"


def table(config: Any, positions: int, seed: int) -> torch.Tensor:
    """(P, E) float32 on the CPU: of each position, noise from (seed, position) alone, bit by bit that of the
    exported code's `state_seed`.
    """
    rows = torch.empty(positions, config.n_embd, dtype=torch.float32, device="cpu")
    for position, row in enumerate(rows):
        digest = hashlib.sha256(f"state:{seed}:{position}".encode()).digest()
        # Generators of CPUs use 32 bits.
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:4], "big"))
        row.copy_(noise(config, torch.empty_like(row), generator))
    return rows


def noise(config: Any, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Noise like x (..., E) as state_init says; x may be overwritten. With a generator in the order of the
    released class's draws; without: from that of x's device, for which it never waits."""
    kind, width = config.state_init, x.shape[-1]
    std = math.sqrt(2 / (5 * width))
    if kind == "like-init" and generator is None:
        return (_cut_normal(x) * (std * config.embedding_scale)).to(x.dtype)
    x = x.normal_(generator=generator)
    if kind == "like-init":
        nn.init.trunc_normal_(x, 0.0, std, -3 * std, 3 * std, generator=generator)
        return x * config.embedding_scale
    if kind == "unit":
        std, mean = torch.std_mean(x, dim=-1, keepdim=True)
        return (x - mean) / std
    return x * width**-0.5 if kind == "embed" else x


def _cut_normal(x: torch.Tensor) -> torch.Tensor:
    """-> float32, like x: a standard normal cut at 3, by the inverse of its distribution.

    torch's `trunc_normal_` redraws what lies outside and asks the device whether anything does, which no CUDA
    graph can. In float32, since bfloat16 has eleven numbers for all between 2 and 3 standard deviations.
    """
    edge = math.erf(3 / math.sqrt(2))
    drawn = torch.empty_like(x, dtype=torch.float32).uniform_(-edge, edge)
    return drawn.erfinv_() * math.sqrt(2)
