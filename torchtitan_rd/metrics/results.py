"""What one optimizer step reports. Numbers may still be on their way from the device when
the step returns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class StepNumbers:
    """The same on every rank.

    loss: mean over the valid tokens of the global batch, in nats.
    loss_max, loss_max_rank: the largest of the ranks' own mean losses, and whose it is.
    grad_norm: L2 norm of all gradients before clipping.
    skipped: whether the update did not happen. consecutive_skips: with this step, how many in a row did not.
    must_stop: whether no update may happen any more (training.on_nonfinite, training.loss_guard).
    stop_requested: whether any rank was asked by a signal to save and stop.
    saved: whether every rank has written its share of the checkpoint that is written in the background.
    has_labels: whether any label of the global batch counts; of none there is no loss.
    """

    loss: float
    loss_max: float
    loss_max_rank: int
    grad_norm: float
    skipped: bool
    consecutive_skips: int
    must_stop: bool
    stop_requested: bool
    saved: bool
    has_labels: bool


@dataclass(eq=False)
class StepResult:
    """Of one step. The first look at a number waits until it has arrived; later looks are free.

    read: waits for the numbers.
    depths: the (n, k) iterations of this rank's microbatches (0, 0 where the model draws none).
    tokens_seen: tokens of all ranks since step 0, this step's included.
    """

    step: int
    read: Callable[[], StepNumbers]
    depths: tuple[tuple[int, int], ...] = ()
    tokens_seen: int = 0

    @cached_property
    def numbers(self) -> StepNumbers:
        return self.read()

    @property
    def loss(self) -> float:
        return self.numbers.loss

    @property
    def grad_norm(self) -> float:
        return self.numbers.grad_norm
