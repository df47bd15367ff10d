"""[lr_scheduler]: the learning rate as a pure function of the step, so that a resumed run cannot drift."""

import math
from typing import Literal

from pydantic import Field

from torchtitan_rd.config_loader import Section


class LRSchedulerConfig(Section):
    schedule: Literal["linear", "cosine", "constant", "trapezoid"] = "linear"
    """What follows the warm-up: linear or cosine decay to the last step, or no decay.
    trapezoid (WSD: warm-up, stable, decay) is constant under the name that is usual with cooldown_steps.
    """
    warmup_steps: int = Field(200, ge=0)
    """Steps of linear warm-up."""
    cooldown_steps: int = Field(0, ge=0)
    """The steps at the end over which the rate falls from the full one, whatever the schedule.
    Under a linear or cosine decay, which is lower by then, the rate first jumps up.
    """
    cooldown_type: Literal["linear", "1-sqrt"] = "linear"
    """The form of the cool-down (1-sqrt: arXiv 2405.18392)."""
    min_lr_factor: float = Field(0.0, ge=0.0, le=1.0)
    """The share of the full rate that a decay or cool-down ends in."""
    convention: Literal["torchtitan", "huginn"] = "torchtitan"
    """Where ramps touch zero. torchtitan: step s of a warm-up over w has s / (w + 1) of the full rate, and
    decays reach their end one step after the last, so that no update is lost. huginn: s / w, decays reach
    their end in the last step, and a cool-down heads for zero but stops at min_lr_factor.
    """


def lr_factor(config: LRSchedulerConfig, step: int, total_steps: int) -> float:
    """The factor on the optimizer's learning rate for update `step` (the first is 1) of `total_steps`.

    From the step after the warm-up (huginn: from its last step) the factor is 1, until a decay begins.
    """
    huginn = config.convention == "huginn"
    floor = config.min_lr_factor
    time = step if huginn else step - 1
    if time < config.warmup_steps:
        return time / config.warmup_steps if huginn else step / (config.warmup_steps + 1)
    if config.cooldown_steps and step > total_steps - config.cooldown_steps:
        progress = min(1.0 - (total_steps - time) / config.cooldown_steps, 1.0)
        share = 1.0 - (progress if config.cooldown_type == "linear" else math.sqrt(progress))
        return max(share, floor) if huginn else floor + (1.0 - floor) * share
    if config.schedule in ("constant", "trapezoid"):
        return 1.0
    progress = min((time - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 1.0)
    share = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (1.0 - floor) * share


def schedule_warnings(config: LRSchedulerConfig) -> list[str]:
    """What is legal but seldom meant, one line each."""
    if not config.cooldown_steps:
        has_no_decay = config.schedule in ("constant", "trapezoid")
        idle = (
            (config.schedule == "trapezoid", 'schedule = "trapezoid" is constant'),
            (has_no_decay and config.min_lr_factor > 0, "min_lr_factor has no effect"),
            (config.cooldown_type != "linear", "cooldown_type has no effect"),
        )
        return [f"[lr_scheduler] {what} without cooldown_steps" for holds, what in idle if holds]
    if config.cooldown_steps and config.schedule in ("linear", "cosine"):
        return [
            f'[lr_scheduler] cooldown_steps = {config.cooldown_steps} after schedule = "{config.schedule}": '
            "the rate jumps up to the full one where the cool-down starts; "
            'schedule = "trapezoid" has no jump'
        ]
    return []
