"""What a raven's forward takes beside tokens: the depth and the first state.

The depth is a function of the step (and of the microbatch and the rank, where each draws its own); the
state is one of the seed, the step and the row.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from torchtitan_rd.errors import ConfigError
from torchtitan_rd.model_spec import ForwardInputs, Microbatch
from torchtitan_rd.models.raven.recurrence import DepthSampler, RecurrenceConfig
from torchtitan_rd.models.raven.shape import RavenShape

VALIDATION_STEP = 0  # updates count from 1, so validation has noise of its own, the same each time


class RavenInputs:
    """Draws for the microbatches of a run. Raises ConfigError if the settings cannot go together."""

    def __init__(
        self, shape: RavenShape, recurrence: RecurrenceConfig | None, *, seed: int, total_steps: int
    ):
        """recurrence: [recurrence]; None: its defaults. seed: training.seed. total_steps: training.steps."""
        recurrence = recurrence or RecurrenceConfig()
        if shape.injection == "none" and not recurrence.lockstep:
            # Without injection, embedding and prelude have a gradient only at n = 0:
            # ranks would not reduce alike.
            raise ConfigError('recurrence.lockstep = false needs an injection: it is "none" in this model')
        if shape.injection == "none" and recurrence.draw_per == "microbatch":
            # The same from one microbatch to the next: what copies of the model (HSDP) hold back
            # would come too late.
            raise ConfigError(
                'recurrence.draw_per = "microbatch" needs an injection: it is "none" in this model'
            )
        self.shape, self.seed = shape, seed
        self.float32_state = recurrence.state_dtype == "float32"
        self.mean_depth = shape.mean_recurrence
        self.sampler = DepthSampler(
            recurrence,
            scheme=shape.sampling_scheme,
            mean_recurrence=shape.mean_recurrence,
            mean_backprop_depth=shape.mean_backprop_depth,
            total_steps=total_steps,
        )

    def __call__(self, microbatch: Microbatch) -> ForwardInputs:
        """The inputs of one training microbatch."""
        draw = self.sampler.draw(microbatch.step, microbatch=microbatch.count, rank=microbatch.rank)
        return self._inputs((draw.num_steps_no_grad, draw.num_steps_with_grad), microbatch.step, microbatch)

    def report(self) -> str:
        """What is drawn, and what a cap takes from it."""
        recurrence, sampler = self.sampler.config, self.sampler
        scheme = recurrence.sampling_scheme or self.shape.sampling_scheme
        text = f"depths: {scheme}, mean {sampler.mean_recurrence.end}"
        text += f", with gradient {sampler.mean_backprop_depth.end}"

        if recurrence.max_steps_no_grad is not None:
            text += f"; max_steps_no_grad = {recurrence.max_steps_no_grad}"
            text += f" cuts {sampler.share_capped():.2%} of the draws"
        return text

    def at_depths(self, depths: Sequence[int], microbatch: Microbatch) -> ForwardInputs:
        """The inputs of a validation microbatch, of which only the samples and the layout count.

        depths: iterations, ascending, all of them without gradient. A smaller depth is the first part of a
        larger one, as state and embedded input are the same, so one forward to the last of them passes them
        all. Raises ConfigError below 1.
        """
        if depths[0] < 1:
            raise ConfigError(f"a depth of {depths[0]} iterations cannot be evaluated: use at least 1")
        *early, deepest = depths
        inputs = self._inputs((deepest, 0), VALIDATION_STEP, microbatch)
        return replace(inputs, kwargs={**inputs.kwargs, "early_read_outs": tuple(early)})

    def _inputs(self, num_steps: tuple[int, int], step: int, microbatch: Microbatch) -> ForwardInputs:
        dtype = torch.float32 if self.float32_state else microbatch.dtype
        state = initial_state(
            self.shape,
            seed=self.seed,
            step=step,
            samples=microbatch.samples,
            seq_len=microbatch.seq_len,
            device=microbatch.device,
            dtype=dtype,
            positions=microbatch.positions,
        )
        kwargs = {
            "num_steps": num_steps,
            "initial_state": state,
            "state_dtype": dtype,
            "head_dtype": microbatch.dtype,
        }
        return ForwardInputs(kwargs, num_steps)


def initial_state(
    shape: RavenShape,
    *,
    seed: int,
    step: int,
    samples: Sequence[int],
    seq_len: int,
    device: torch.device,
    dtype: torch.dtype,
    positions: range | None = None,
) -> torch.Tensor | None:
    """-> (B, S, E) first states, a function of (seed, step, sample) in each row; None for injection "none".

    positions: (B, their number, E) of those of the S alone. Each row is drawn whole nevertheless.

    like-init: a standard normal cut at 3, times the embedding's initial std and scale; normal: std 1;
    embed: std E^-0.5; zero; unit: normal, standardised over E (unbiased std).

    One generator a row, on the device itself: a row of 131072 x 5280 numbers takes seconds on a CPU
    core. Values therefore repeat on the same kind of device, not from CPU to GPU. Drawn in float32;
    costs one such row of memory.
    """
    if shape.injection == "none":
        return None
    positions = range(seq_len) if positions is None else positions
    own = slice(positions.start, positions.stop)
    state = torch.zeros(len(samples), len(positions), shape.dim, device=device, dtype=dtype)
    if shape.state_init != "zero":
        for row, sample in zip(state, samples, strict=True):
            generator = torch.Generator(device).manual_seed(_row_seed(seed, step, sample))
            whole = _noise(shape, torch.empty(seq_len, shape.dim, device=device), generator)
            row.copy_(whole[own])
    return state


def _noise(shape: RavenShape, row_SE: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if shape.state_init == "like-init":
        # By the inverse of the distribution: redrawing what lies outside would wait for the device.
        edge = math.erf(3 / math.sqrt(2))
        scale = shape.weight_std * shape.embedding_scale * math.sqrt(2)
        return row_SE.uniform_(-edge, edge, generator=generator).erfinv_().mul_(scale)
    row_SE.normal_(generator=generator)
    if shape.state_init == "embed":
        return row_SE.mul_(shape.dim**-0.5)
    if shape.state_init == "unit":
        std, mean = torch.std_mean(row_SE, dim=-1, keepdim=True)
        return row_SE.sub_(mean).div_(std)
    return row_SE


def _row_seed(seed: int, step: int, sample: int) -> int:
    """A 63-bit seed that differs for every row of a run."""
    return int.from_bytes(hashlib.sha256(f"state:{seed}:{step}:{sample}".encode()).digest()[:8], "big") >> 1
