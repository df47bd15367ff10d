"""Rotary positions as a raven has them: interleaved pairs, in float32. Needs torch alone.

vLLM's own layer rounds the table of cosines to the model's type, which moves logits after some iterations.

Shapes: T tokens, H heads, D head dim.
"""

import math
from typing import Any

import torch


def frequencies(config: Any) -> torch.Tensor:
    """(D/2,) float32 on the CPU, radians a position: rope_base^(-2i/D), or stretched as Llama 3.1's."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    plain = 1.0 / config.rope_base**exponents
    return plain if config.llama3_rope is None else stretched(plain, **config.llama3_rope)


def stretched(
    plain: torch.Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> torch.Tensor:
    """Divided by `factor` where they turn less than low_freq_factor times within the original context, kept
    where more than high_freq_factor times; the share in between is linear in the number of turns.
    """
    turns = original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return plain * (kept + (1 - kept) / factor)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (2i, 2i + 1) of (T, H, D) by their angles: cos and sin are (T, 1, D/2) float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).type_as(x)
