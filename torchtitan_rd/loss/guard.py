"""Stops a run whose loss has gone up for good, before it spends its time."""

import math

from torch import Tensor

from torchtitan_rd.errors import TrainingError
from torchtitan_rd.loss.config import ObjectiveKeys


def exceeds_guard(config: ObjectiveKeys, loss: Tensor, tokens_seen: int) -> Tensor:
    """Whether `loss` exceeds the guard after its number of tokens: 0-dim bool on the device of `loss`, for no host.

    loss: the mean over the global batch, in nats, so that every rank decides alike. tokens_seen: those of this step
    included.
    """
    guard = config.loss_guard
    if guard is None or tokens_seen <= config.loss_guard_after_tokens:
        guard = math.inf
    return loss > guard


def guard_error(config: ObjectiveKeys, step: int, loss: float, tokens_seen: int) -> TrainingError:
    """What to raise once the host knows that the guard was exceeded."""
    return TrainingError(
        f"step {step}: loss {loss:.4f} exceeds training.loss_guard = {config.loss_guard} after {tokens_seen} tokens: "
        f"resume from an older checkpoint (checkpoint.load_step) with a lower rate, or raise or unset the guard"
    )
