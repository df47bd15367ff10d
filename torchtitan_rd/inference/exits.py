"""When a recurrent model has thought enough about a token: the criteria by which a sequence
leaves the recurrence.

Shapes: B batch, S positions of the forward, E dim, V vocabulary. State s_t and last position's logits l_t
after iteration t, p_t = softmax(l_t). A sequence leaves as soon as value < threshold (`argmax-stability`:
value >= threshold).

    criterion         threshold  value
    entropy-diff      1e-3       |H_t - H_(t-1)|, H = -sum p log(p + 1e-10), H_0 = 100
    kl                1e-3       KL(p_(t-1) || p_t), p_0 uniform
    minp-kl           1e-5       the same, after p < 0.1 max p are set to 1/V and p is renormalised
    argmax-stability  5          how many times in a row the most likely token has stayed the same
    latent-diff       0.03       ||s_t - s_(t-1)|| / ||s_t||, mean over positions
    cosine            1e-3       1 - cos(s_t, s_(t-1)), mean over positions
    none                         never leaves

Source: the code released with arXiv 2502.05171. Those on logits cost a coda and a head each iteration.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from torchtitan_rd.errors import ConfigError, nearest


class Seen(NamedTuple):
    """What a criterion may look at after an iteration. logits: (B, V); empty for one on states. real: (B,
    S) bool, False where a prompt is padded; None: no padding."""

    state: torch.Tensor
    previous: torch.Tensor
    logits: torch.Tensor
    real: torch.Tensor | None


Measure = Callable[[Seen], torch.Tensor]


class Start(Protocol):
    """(B, V, device) -> the value (B,) of each iteration of one forward, which may remember the last one."""

    def __call__(self, batch: int, vocab_size: int, device: torch.device) -> Measure: ...


def _entropy_diff(batch: int, vocab_size: int, device: torch.device) -> Measure:
    last = torch.full((batch,), 100.0, device=device)

    def value(seen: Seen) -> torch.Tensor:
        nonlocal last
        p = seen.logits.softmax(-1)
        before, last = last, -(p * torch.log(p + 1e-10)).sum(-1)
        return (last - before).abs()

    return value


def _kl(batch: int, vocab_size: int, device: torch.device, min_p: float = 0.0) -> Measure:
    last = torch.full((batch, vocab_size), 1 / vocab_size, device=device).log()

    def value(seen: Seen) -> torch.Tensor:
        nonlocal last
        before, last = last, seen.logits.log_softmax(-1)
        if min_p:
            p = last.exp()
            p = p.where(p >= min_p * p.amax(-1, keepdim=True), 1 / vocab_size)
            last = (p / p.sum(-1, keepdim=True)).log()
        return F.kl_div(last, before, reduction="none", log_target=True).sum(-1)

    return value


def _minp_kl(batch: int, vocab_size: int, device: torch.device) -> Measure:
    return _kl(batch, vocab_size, device, min_p=0.1)


def _argmax_stability(batch: int, vocab_size: int, device: torch.device) -> Measure:
    last = torch.full((batch,), -1, device=device)
    count = torch.zeros(batch, device=device)

    def value(seen: Seen) -> torch.Tensor:
        nonlocal last, count
        before, last = last, seen.logits.argmax(-1)
        count = torch.where(last == before, count + 1, 0.0)
        return count

    return value


def _latent_diff(batch: int, vocab_size: int, device: torch.device) -> Measure:
    return lambda seen: _mean((seen.state - seen.previous).norm(dim=-1) / seen.state.norm(dim=-1), seen.real)


def _cosine(batch: int, vocab_size: int, device: torch.device) -> Measure:
    return lambda seen: _mean(1 - F.cosine_similarity(seen.state, seen.previous, dim=-1), seen.real)


def _mean(x_BS: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    if real is None:
        return x_BS.mean(-1)
    return x_BS.where(real, 0.0).sum(-1) / real.sum(-1)


@dataclass(frozen=True)
class Criterion:
    """threshold: unless told otherwise. on_logits: whether it looks at them. counts: a sequence leaves at and
    above the threshold, not below it."""

    start: Start
    threshold: float
    on_logits: bool
    counts: bool = False


CRITERIA: Mapping[str, Criterion] = {
    "entropy-diff": Criterion(_entropy_diff, 1e-3, True),
    "kl": Criterion(_kl, 1e-3, True),
    "minp-kl": Criterion(_minp_kl, 1e-5, True),
    "argmax-stability": Criterion(_argmax_stability, 5, True, counts=True),
    "latent-diff": Criterion(_latent_diff, 0.03, False),
    "cosine": Criterion(_cosine, 1e-3, False),
}
NEVER = "none"
"""The policy without a criterion."""


@dataclass(frozen=True)
class ExitPolicy:
    """criterion: a name of CRITERIA, or NEVER. threshold: None takes the criterion's own.
    min_steps: iterations that every token gets.
    every: the criterion is asked after each so many iterations. in_prefill: whether the prompt may be left
    early too, all of its positions at once. Raises ConfigError."""

    criterion: str = NEVER
    threshold: float | None = None
    min_steps: int = 1
    every: int = 1
    in_prefill: bool = True

    def __post_init__(self) -> None:
        known = (*CRITERIA, NEVER)
        if self.criterion not in known:
            raise ConfigError(f"exit criterion {self.criterion!r} is unknown{nearest(self.criterion, known)}")
        if self.threshold is not None and not self.threshold >= 0:
            raise ConfigError(f"exit threshold {self.threshold} must be at least 0")
        if self.min_steps < 1 or self.every < 1:
            raise ConfigError(
                f"exit: min_steps = {self.min_steps} and every = {self.every} must be at least 1"
            )

    @property
    def rule(self) -> Criterion:
        """Of every policy but NEVER's."""
        return CRITERIA[self.criterion]

    def leaves(self, values: torch.Tensor) -> torch.Tensor:
        """(B,) values -> (B,) bool."""
        threshold = self.rule.threshold if self.threshold is None else self.threshold
        return values >= threshold if self.rule.counts else values < threshold
