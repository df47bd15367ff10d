"""[lr_scheduler]: the learning rate as a pure function of the step, so that a resumed run cannot drift."""

import math
from typing import Literal

from pydantic import Field

from torchtitan_rd.config_loader import Section


class LRSchedulerConfig(Section):
    schedule: Literal["linear", "cosine", "constant", "trapezoid"] = "linear"
    """What follows the warm-up: linear or cosine decay to the last step, no decay, or trapezoid (WSD: warm-up,
    stable, decay over the last cooldown_steps)."""
    warmup_steps: int = Field(200, ge=0)
    """Steps of linear warm-up: step s of w has s / (w + 1) of the full rate."""
    cooldown_steps: int = Field(0, ge=0)
    """trapezoid: the steps at the end over which the rate decays."""
    cooldown_type: Literal["linear", "1-sqrt"] = "linear"
    """trapezoid: the form of that decay (1-sqrt: arXiv 2405.18392)."""
    min_lr_factor: float = Field(0.0, ge=0.0, le=1.0)
    """The share of the full rate that a decay ends in."""


def lr_factor(config: LRSchedulerConfig, step: int, total_steps: int) -> float:
    """The factor on the optimizer's learning rate for update `step` (the first is 1) of `total_steps`.

    The update after the warm-up has the full rate; decays would reach `min_lr_factor` at `total_steps + 1`, so that
    no update is without effect.
    """
    done = step - 1  # updates before this one
    if done < config.warmup_steps:
        return step / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    length = config.cooldown_steps if config.schedule == "trapezoid" else total_steps - config.warmup_steps
    progress = (done - (total_steps - length)) / max(length, 1)
    progress = min(max(progress, 0.0), 1.0)
    if config.schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "trapezoid" and config.cooldown_type == "1-sqrt":
        remaining = 1.0 - math.sqrt(progress)
    else:
        remaining = 1.0 - progress
    return config.min_lr_factor + (1.0 - config.min_lr_factor) * remaining
