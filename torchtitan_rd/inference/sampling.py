"""From logits (B, V) to one token a row. The rules and their order are those of transformers' `generate`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchtitan_rd.errors import ConfigError

_COLDEST = 1e-6  # logits over less than this may overflow, and the draw would be of NaN


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises ConfigError for values out of range.

    temperature: 0 takes the most likely token. top_k: only the k most likely. top_p: only the fewest most
    likely whose probabilities reach this sum, the one that crosses it included. min_p: only those with at
    least this share of the largest probability. repetition_penalty: logits of tokens that the row holds
    already are divided by it if positive, else multiplied.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, allowed, range_ in (
            (
                "temperature",
                self.temperature,
                self.temperature == 0 or _COLDEST <= self.temperature < float("inf"),
                f"0 (the most likely token) or at least {_COLDEST}",
            ),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < float("inf"),
                "above 0",
            ),
        ):
            if not allowed:
                raise ConfigError(f"{name} = {value} must be {range_}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """seen: (B, V) bool. See `Sampling.repetition_penalty`."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def restrict(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(B, V) logits over the temperature, -inf where top_k, top_p and min_p, in this order, leave nothing."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    if sampling.min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def choose(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> torch.Tensor:
    """-> (B,) ids. uniform: (B,) float64 in [0, 1), what decides each row's draw; None if greedy."""
    if uniform is None:
        return logits.argmax(-1)
    steps = restrict(logits, sampling).double().softmax(-1).cumsum(-1)
    found = torch.searchsorted(steps, (uniform * steps[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def uniforms(seed: int, rows: Sequence[int], count: int) -> torch.Tensor:
    """(B, count) float64 in [0, 1): what the row of that number draws for each of its tokens. A function of
    (seed, row) alone, so that a prompt gives the same tokens in any batch and on any number of ranks."""
    drawn = []
    for row in rows:
        digest = hashlib.sha256(f"sample:{seed}:{row}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        drawn.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(drawn)
