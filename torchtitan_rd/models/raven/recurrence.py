"""[recurrence]: how deep the core is run in training.
Depths are pure functions of the step, or of the microbatch where each draws its own (arXiv 2502.05171).

A draw is (n, k): n iterations without gradient, then k with it (truncated backpropagation).
Letters of the table below: t = max(mean_recurrence - mean_backprop_depth, 0), s = mean_backprop_depth.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator

from torchtitan_rd.config_loader import Section, nearest
from torchtitan_rd.errors import ConfigError

SEED_N, SEED_K, SEED_MODULUS = 514229, 317811, 2**31 - 1  # Huginn's
LOGNORMAL_SIGMA = 0.5


class RecurrenceConfig(Section):
    """Depths drawn in training; read by recurrent models only."""

    sampling_scheme: str | None = None
    """Distribution of the depths, also as `<scheme>-curriculum-<steps>`. By default the flavor's."""
    draw_per: Literal["step", "microbatch"] = "step"
    """step: all microbatches of a step share its draw, whatever the accumulation.
    microbatch: each has its own.
    """
    lockstep: bool = True
    """All ranks draw the same depth; otherwise each draws its own, and the deepest one sets the pace."""
    max_steps_no_grad: int | None = Field(None, ge=0)
    """Cap on the iterations without gradient, which bounds the slowest step.
    The share of draws it cuts is logged.
    """
    mean_recurrence_start: int | None = Field(None, ge=1)
    """Mean recurrence at the start of a ramp to the model's own; by default there is no ramp."""
    mean_recurrence_warmup: float = Field(0.25, gt=0.0, le=1.0)
    """The share of training.steps that this ramp takes."""
    mean_recurrence_warmup_type: Literal["linear", "1-sqrt"] = "linear"
    """Form of this ramp: a share p of it is passed at p, or at 1 - sqrt(1 - p),
    which stays shallow longer.
    """
    mean_backprop_depth_start: int | None = Field(None, ge=1)
    """Mean backprop depth at the start of a ramp to the model's own; by default there is no ramp."""
    mean_backprop_depth_warmup: float = Field(0.25, gt=0.0, le=1.0)
    """The share of training.steps that this ramp takes."""
    mean_backprop_depth_warmup_type: Literal["linear", "1-sqrt"] = "linear"
    """Form of this ramp."""
    backprop_depth_follows_mean: bool = False
    """Where the mean recurrence is below the mean backprop depth, as at the start of a ramp, the
    latter is the former (arXiv 2511.07384). Otherwise a ramp has no effect before it passes the
    backprop depth.
    """
    state_dtype: Literal["float32", "as_param"] = "float32"
    """Type of the state, the embedded input and the residual stream (docs/recurrence.md). as_param: that of
    training.mixed_precision_param."""
    core_grad_dtype: Literal["as_param", "float32"] = "as_param"
    """Type in which a microbatch's gradient of the core is summed over its iterations.
    float32 takes 2 more bytes a parameter of the core during backward than bfloat16.
    """

    @field_validator("sampling_scheme")
    @classmethod
    def _known_scheme(cls, name: str | None) -> str | None:
        if name is not None:
            try:
                parse_scheme(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return name


class Draw(NamedTuple):
    """The iterations of one forward."""

    num_steps_no_grad: int
    num_steps_with_grad: int


Rng = torch.Generator


class Scheme(NamedTuple):
    """draw: (t, s, generator of n, generator of k) -> (n, k).
    least_t: the smallest t that it is defined for.
    """

    draw: Callable[[int, int, Rng, Rng], tuple[int, int]]
    least_t: int = 0


def _poisson(rate: torch.Tensor | float, rng: Rng) -> int:
    return int(torch.poisson(torch.as_tensor(rate, dtype=torch.float32).view(1), generator=rng))


def _lognormal(mean: float, rng: Rng) -> torch.Tensor:
    """A float32 draw from the log-normal of that mean."""
    return torch.zeros(1).log_normal_(math.log(mean) - LOGNORMAL_SIGMA**2 / 2, LOGNORMAL_SIGMA, generator=rng)


def _below(high: int, rng: Rng) -> int:
    """Uniform on 0 .. high - 1."""
    return int(torch.randint(0, high, (1,), generator=rng))


def _geometric(mean: int, rng: Rng) -> int:
    # torch wants a probability below 1; with probability 1 the draw is certain.
    return 1 if mean == 1 else int(torch.ones(1).geometric_(1 / mean, generator=rng))


def _filling(t: int, s: int, rng_n: Rng, rng_k: Rng) -> tuple[int, int]:
    depth = _poisson(_lognormal(t + s, rng_n), rng_n) + 1
    return max(depth - s, 0), min(s, depth)


def _bptt(t: int, s: int, rng_n: Rng, rng_k: Rng) -> tuple[int, int]:
    """n + k stays within 2t."""
    n = _below(2 * t, rng_n)
    return n, 1 + _below(min(2 * t - n, 2 * s), rng_k)


def _non_uniform(t: int, s: int, rng_n: Rng, rng_k: Rng) -> tuple[int, int]:
    """n + k is nearly uniform."""
    depth, k = _below(2 * t, rng_n), 1 + _below(2 * min(t, s), rng_k)
    return max(depth - k, 0), k


def _gupta(t: int, s: int, rng_n: Rng, rng_k: Rng) -> tuple[int, int]:
    """k is 1 nearly always. Huginn's program drew even less where n > t, in 8 % of the steps,
    and no core was trained by them; here k is at least 1.
    """
    n, share = _below(2 * t, rng_n), torch.rand(1, generator=rng_k)
    skew = torch.randint(2 * t, 8 * t, (1,), generator=rng_k)
    return n, max(int(1 + (t - n) * share**skew), 1)


def _negative_binomial(t: int, s: int, rng_n: Rng, rng_k: Rng) -> tuple[int, int]:
    """n has mean t and variance 2t. From the seeds of the step, while Huginn's program took
    the global ones.
    """
    rate = torch._standard_gamma(torch.full((1,), float(t)), generator=rng_n)
    return _poisson(rate, rng_n), 1 + _below(2 * s, rng_k)


def _sobol(t: int, s: int, rng_n: Rng, rng_k: Rng) -> tuple[int, int]:
    """The first point of a scrambled sequence in (n, k)."""
    point = torch.quasirandom.SobolEngine(dimension=2, scramble=True, seed=rng_n.initial_seed()).draw(1)[0]
    return int(point[0] * 2 * t), int(point[1] * 2 * s + 1)


SCHEMES = {
    "poisson-lognormal-filling": Scheme(_filling),
    "poisson-lognormal-fill": Scheme(
        lambda t, s, rng_n, rng_k: (_poisson(_lognormal(t, rng_n), rng_n), s), 1
    ),
    "poisson-lognormal": Scheme(
        lambda t, s, rng_n, rng_k: (_poisson(_lognormal(t, rng_n), rng_n), 1 + _below(2 * s, rng_k)), 1
    ),
    "poisson-fill": Scheme(lambda t, s, rng_n, rng_k: (_poisson(t, rng_n), s)),
    "poisson-unbounded": Scheme(lambda t, s, rng_n, rng_k: (_poisson(t, rng_n), 1 + _below(2 * s, rng_k))),
    "poisson-bounded": Scheme(
        lambda t, s, rng_n, rng_k: (min(_poisson(t, rng_n), 2 * t - 1), 1 + _below(2 * s, rng_k)), 1
    ),
    "simple": Scheme(lambda t, s, rng_n, rng_k: (_below(2 * t, rng_n), 1 + _below(2 * s, rng_k)), 1),
    "bptt": Scheme(_bptt, 1),
    "non-uniform": Scheme(_non_uniform, 1),
    "gupta": Scheme(_gupta, 1),
    "negative-binomial": Scheme(_negative_binomial, 1),
    "sobol": Scheme(_sobol),
    "geometric": Scheme(lambda t, s, rng_n, rng_k: (_geometric(t, rng_n), 1 + _below(2 * s, rng_k)), 1),
    "fixed": Scheme(lambda t, s, rng_n, rng_k: (t, s)),
    "full": Scheme(lambda t, s, rng_n, rng_k: (0, 1 + _below(2 * s, rng_k))),
    "non-recurrent": Scheme(lambda t, s, rng_n, rng_k: (0, 1)),
}


def parse_scheme(name: str) -> tuple[Scheme, int]:
    """`<scheme>` or `<scheme>-curriculum-<steps>` -> (row, steps of the curriculum or 0).
    Raises ConfigError.
    """
    found = re.fullmatch(r"(.+)-curriculum-(\d+)", name)
    scheme, length = (found[1], int(found[2])) if found else (name, 0)
    if scheme not in SCHEMES:
        raise ConfigError(f"sampling_scheme = {name!r} is no sampling scheme{nearest(scheme, SCHEMES)}")
    if found and length == 0:
        raise ConfigError(f"sampling_scheme = {name!r}: a curriculum needs at least 1 step")
    return SCHEMES[scheme], length


@dataclass(frozen=True)
class Ramp:
    """A whole number that rises from `start` to `end` over `steps` steps, rounded up on the way."""

    start: int
    end: int
    steps: int = 0
    kind: Literal["linear", "1-sqrt"] = "linear"

    def at(self, step: int) -> int:
        if step >= self.steps:
            return self.end
        share = step / self.steps
        if self.kind == "1-sqrt":
            share = 1 - math.sqrt(1 - share)
        return math.ceil(self.start + (self.end - self.start) * share)


class DepthSampler:
    """Draws depths. Raises ConfigError if the scheme is not defined for the means that it will meet.

    mean_recurrence, mean_backprop_depth: the model's. total_steps: optimizer updates of the run,
    which ramps refer to.
    """

    def __init__(
        self,
        config: RecurrenceConfig,
        *,
        scheme: str,
        mean_recurrence: int,
        mean_backprop_depth: int,
        total_steps: int,
    ):
        self.config = config
        name = config.sampling_scheme or scheme
        self.scheme, self.curriculum = parse_scheme(name)

        self.mean_recurrence = _ramp(
            config.mean_recurrence_start,
            mean_recurrence,
            math.ceil(config.mean_recurrence_warmup * total_steps),
            config.mean_recurrence_warmup_type,
        )
        self.mean_backprop_depth = _ramp(
            config.mean_backprop_depth_start,
            mean_backprop_depth,
            math.ceil(config.mean_backprop_depth_warmup * total_steps),
            config.mean_backprop_depth_warmup_type,
        )

        # Ramps may cross: each step is looked at, not the ends alone.
        for step in range(1, max(self.mean_recurrence.steps, self.mean_backprop_depth.steps, 1) + 1):
            means = self.means(step)
            if max(means[0] - means[1], 0) < self.scheme.least_t:
                raise ConfigError(
                    f"sampling_scheme = {name!r} needs mean_recurrence > mean_backprop_depth, "
                    f"but they are {means[0]} and {means[1]} at step {step}: "
                    "change one, or use 'poisson-lognormal-filling'"
                )

    def means(self, step: int) -> tuple[int, int]:
        """Mean recurrence and mean backprop depth in an update, before any curriculum."""
        mean, backprop = self.mean_recurrence.at(step), self.mean_backprop_depth.at(step)
        return mean, min(mean, backprop) if self.config.backprop_depth_follows_mean else backprop

    def draw(self, step: int, *, microbatch: int | None = None, rank: int = 0) -> Draw:
        """The depth of optimizer update `step` (the first is 1), or, with draw_per = "microbatch", of
        the `microbatch`-th microbatch that a rank runs since the start (the first is 1), which
        curricula then count too.

        Both generators live on the CPU and are seeded by this number
        (times rank + 1 where ranks draw their own).
        """
        count = microbatch if self.config.draw_per == "microbatch" and microbatch is not None else step
        n, k = self._uncapped(step, count, 0 if self.config.lockstep else rank)
        return Draw(n if self.config.max_steps_no_grad is None else min(n, self.config.max_steps_no_grad), k)

    def share_capped(self, draws: int = 20_000) -> float:
        """The probability that max_steps_no_grad shortens a draw:
        its share among the first draws, ramps passed.
        """
        if self.config.max_steps_no_grad is None:
            return 0.0
        first = max(self.mean_recurrence.steps, self.mean_backprop_depth.steps, self.curriculum) + 1
        cut = sum(
            self._uncapped(i, i, 0)[0] > self.config.max_steps_no_grad for i in range(first, first + draws)
        )
        return cut / draws

    def _uncapped(self, step: int, count: int, rank: int) -> tuple[int, int]:
        mean, s = self.means(step)
        t = max(mean - s, 0)
        if count <= self.curriculum:
            t = math.ceil(count / self.curriculum * t)
            s = max(math.ceil(count / self.curriculum * s), 1)
        rng_n = torch.Generator().manual_seed((SEED_N + count) * (rank + 1) % SEED_MODULUS)
        rng_k = torch.Generator().manual_seed((SEED_K + count) * (rank + 1) % SEED_MODULUS)
        return self.scheme.draw(t, s, rng_n, rng_k)


def _ramp(start: int | None, end: int, steps: int, kind: Literal["linear", "1-sqrt"]) -> Ramp:
    return Ramp(end, end) if start is None else Ramp(start, end, steps, kind)
