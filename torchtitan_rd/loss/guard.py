"""Stops a run whose loss has gone up for good, before it spends its time."""

from torchtitan_rd.errors import TrainingError
from torchtitan_rd.loss.config import ObjectiveKeys


def check_loss(config: ObjectiveKeys, step: int, loss: float, tokens_seen: int) -> None:
    """Raises TrainingError if `loss` exceeds the guard after its number of tokens.

    loss: the mean over the global batch, in nats, so that every rank decides alike. tokens_seen: those of `step`
    included.
    """
    if config.loss_guard is None or tokens_seen <= config.loss_guard_after_tokens or loss <= config.loss_guard:
        return
    raise TrainingError(
        f"step {step}: loss {loss:.4f} exceeds training.loss_guard = {config.loss_guard} after {tokens_seen} tokens: "
        f"resume from an older checkpoint (checkpoint.load_step) with a lower rate, or raise or unset the guard"
    )
