"""A spike of the loss: when it is one, what is given up for it, and how often.

A batch of bad data may throw a run back for good, although no number is infinite. The way out that is known
to work (PaLM, arXiv 2204.02311, section 5.1) is to go back to a checkpoint from before and to train past the
batches in question. What was passed over is kept in the dump folder, so that a restart passes over the same.
"""

import json
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from torchtitan_rd.config_loader import Section
from torchtitan_rd.errors import TrainingError
from torchtitan_rd.log import logger
from torchtitan_rd.whole_file import replace_file

ROLLBACKS = "rollbacks.json"
_NORMAL = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
_FLATTEST = 0.01  # of the median: a loss that hardly moves has no deviation of its own


class SpikeKeys(Section):
    """The keys of [training] that are about spikes."""

    on_spike: Literal["ignore", "rollback"] = "ignore"
    """What a spike of the loss does. rollback: back to the newest good checkpoint from before it, and on past
    the batches from the one before the spike to the one where it was noticed (docs/reliability.md).
    """
    spike_window: int = Field(100, ge=3)
    """on_spike: the number of steps that a loss is compared with. Before there are so many, none is a spike.
    """
    spike_deviations: float = Field(10.0, gt=0.0)
    """on_spike: a spike is a loss that lies more than so many standard deviations above the median of the
    window. The deviation is taken from the median absolute one, and is at least 1 % of the median.
    """
    max_rollbacks: int = Field(3, ge=1)
    """on_spike: one spike more than this stops the run."""


@dataclass(frozen=True)
class Spike:
    """step: whose loss spiked; seen_at: the step in which that was noticed. median: of the window.
    first_batch, last_batch: to be passed over.
    """

    step: int
    seen_at: int
    loss: float
    median: float
    first_batch: int
    last_batch: int

    def __str__(self) -> str:
        return f"step {self.step}: the loss is {self.loss:.4f}, where {self.median:.4f} is usual"


class SpikeWatch:
    """Judges losses in their order. All ranks see the same numbers, and so judge alike."""

    def __init__(self, keys: SpikeKeys):
        self.keys = keys
        self._losses: deque[float] = deque(maxlen=keys.spike_window)
        self._batches: dict[int, int] = {}

    def began(self, step: int, batch: int) -> None:
        """`step` trains on `batch`."""
        self._batches[step] = batch
        self._batches.pop(step - 3, None)

    def judge(self, step: int, loss: float, seen_at: int) -> Spike | None:
        """A loss that is no spike joins the window. Infinite ones, and NaN, are not for this to judge
        (training.on_nonfinite).
        """
        if len(self._losses) < self.keys.spike_window or not loss > self._bound():
            self._losses.append(loss)
            return None
        batch = self._batches[step]
        first = self._batches.get(step - 1, batch)
        median = statistics.median(self._losses)
        return Spike(step, seen_at, loss, median, first, self._batches[seen_at])

    def _bound(self) -> float:
        median = statistics.median(self._losses)
        deviation = _NORMAL * statistics.median(abs(loss - median) for loss in self._losses)
        return median + self.keys.spike_deviations * max(deviation, _FLATTEST * abs(median))


class Rollbacks:
    """Those of a run, in `folder`; on rank 0 (`writes`) written there."""

    def __init__(self, folder: Path, keys: SpikeKeys, *, writes: bool):
        self._path, self._writes = folder / ROLLBACKS, writes
        self._most = keys.max_rollbacks
        self._made: list[dict] = []

    def read(self, *, is_new_run: bool) -> list[dict]:
        """On rank 0: those that were made; none in a new run, which keeps an older one's aside."""
        if is_new_run and self._path.exists():
            self._path.replace(self._path.with_name("rollbacks.previous.json"))
        try:
            return json.loads(self._path.read_text())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise TrainingError(
                f"{self._path} cannot be read ({error}): it lists the batches that a rollback passes over; "
                "mend it, or remove it to read them again"
            ) from None

    def take(self, made: list[dict]) -> list[list[int]]:
        """What rank 0 has read; returns the ranges of batches that are passed over."""
        self._made = list(made)
        return [one["batches"] for one in self._made]

    def refuse_one_too_many(self, spike: Spike) -> None:
        """Raises TrainingError after as many rollbacks as are allowed."""
        if len(self._made) >= self._most:
            raise TrainingError(
                f"{spike}; training.max_rollbacks = {self._most} rollbacks have been made: look at the data "
                f"of batches {spike.first_batch} to {spike.last_batch}, or lower the learning rate"
            )

    def add(self, spike: Spike, to_step: int) -> list[list[int]]:
        """Notes one that was made, before training goes on; returns the ranges that it passes over."""
        batches = [spike.first_batch, spike.last_batch]
        self._made.append({**asdict(spike), "to_step": to_step, "batches": batches, "time": time.time()})
        if self._writes:
            replace_file(self._path, json.dumps(self._made, indent=1) + "\n")
        logger.warning(
            "%s: went back to step %d (rollback %d of %d); batches %d to %d are passed over",
            *(spike, to_step, len(self._made), self._most, *batches),
        )
        return [batches]
